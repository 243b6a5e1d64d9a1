# Each target is one line that calls a script or a tool. `make` prints help.
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
VENV ?= .venv
TORCH ?= torch==2.13.0

RUN = $(VENV)/bin/python

.PHONY: help setup demo test lint bench bench-gpu paper-table clean
.DEFAULT_GOAL := help

help:  ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST); echo; echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH='$(TORCH)'"

setup:  ## make the virtual environment (mmcv is compiled once: 10 to 20 minutes)
	@$(PYTHON) tools/setup_env.py --venv '$(VENV)' --torch '$(TORCH)'

demo: setup  ## train and evaluate a small RedNet detector on CPU (about 6 minutes)
	@$(RUN) tools/demo.py

test: setup  ## run the tests, on up to four cores
	@$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: setup  ## ruff: rules and format
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check .

bench: setup  ## time involution and RedNet beside their alternatives, short form
	@$(RUN) tools/analysis_tools/benchmark_op.py --image 8x224x224 --rounds 3 && $(RUN) tools/analysis_tools/benchmark_model.py --shape 4x3x224x224 --rounds 3

bench-gpu: setup  ## the tests on a GPU, then all figures of a GPU
	@PYTHON=$(RUN) tools/analysis_tools/benchmark_gpu.sh

paper-table: setup  ## our parameters and FLOPs beside the paper's
	@$(RUN) tools/analysis_tools/paper_table.py

clean:  ## remove the virtual environment and build products (the wheel cache stays)
	@rm -rf '$(VENV)' build dist mmcls_involution.egg-info mmcls_involution/.mim .pytest_cache .ruff_cache
