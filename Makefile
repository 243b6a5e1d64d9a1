# Each target is one line that calls a script or a tool. `make` prints help.
PYTHON ?= $(or $(shell for p in python3.11 python3.12 python3.13 python3.10; do $$p -c '' 2>/dev/null && echo $$p && break; done),python3)
VENV ?= .venv
TORCH ?= torch==2.13.0

RUN = $(VENV)/bin/python
PIP = $(RUN) -m pip
# No byte-compiling: most of what is installed is never imported.
INSTALL = $(PIP) install --no-compile
TESTED = $(INSTALL) --constraint requirements/tested.txt
comma := ,
INSTALLED = $(VENV)/lib/python3*/site-packages
# Another TORCH, or this folder under another name, is another set-up.
KEY := $(shell echo '$(TORCH) $(CURDIR)' | cksum | cut -d' ' -f1)
SOURCES = requirements/tested.txt setup.py pyproject.toml mmcls_involution/version.py $(wildcard mmcls_involution/ops/backends/native/*.cpp mmcls_involution/ops/backends/native/*.h)

.PHONY: help setup mmcv demo test test-long soak lint docs bench bench-gpu paper-table clean
.DEFAULT_GOAL := help

help:  ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST); echo; echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH='$(TORCH)'"

setup: $(VENV)/setup-$(KEY)  ## make the virtual environment, with all that is needed

# pip keeps a torch that satisfies TORCH, though it may be another build: away with it.
$(VENV)/torch-$(KEY):
	@$(PYTHON) tools/make_venv.py '$(VENV)'
	@rm -f '$(VENV)'/torch-* '$(VENV)'/setup-* '$(VENV)'/docs-*
	$(if $(wildcard $(INSTALLED)/torch),$(PIP) uninstall --yes torch torchvision)
	$(INSTALL) $(foreach word,$(TORCH),'$(word)') torchvision
	@touch $@

# The extra `all` brings mmcv-lite, which must not be written over a compiled mmcv.
$(VENV)/setup-$(KEY): $(VENV)/torch-$(KEY) $(SOURCES)
	@$(PYTHON) tools/make_venv.py '$(VENV)'
	$(TESTED) setuptools
	$(TESTED) --no-build-isolation --editable '.[$(if $(wildcard $(INSTALLED)/mmcv-*.dist-info),det$(comma)seg$(comma)cls,all),dev]'
	@$(RUN) -c 'import cv2' || { echo 'opencv-python gives way to its build without windows'; $(PIP) uninstall --yes opencv-python && $(TESTED) --force-reinstall --no-deps opencv-python-headless; }
	@$(RUN) -m mmcls_involution.doctor && touch $@

mmcv: setup  ## compile mmcv with all its operators, in place of mmcv-lite (20 CPU minutes)
	@rm '$(VENV)/setup-$(KEY)'
	$(PIP) uninstall --yes mmcv mmcv-lite
	$(INSTALL) 'setuptools<82' wheel ninja psutil
	PATH="$(abspath $(VENV))/bin:$$PATH" CFLAGS='-O2 -g0' $(INSTALL) --no-build-isolation --no-deps --no-cache-dir mmcv==2.1.0
	@$(MAKE) setup

demo: setup  ## train and evaluate a small RedNet detector on CPU (3 to 7 minutes)
	@$(RUN) tools/demo.py

test: setup  ## run the tests, on up to four cores
	@$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test-long: setup  ## the tests that take long: sweeps of sizes, compilers, interpreters
	@$(RUN) -m pytest -m long --numprocesses auto --maxprocesses 4 --dist worksteal

soak: setup  ## kill a small training 200 times and one of its two processes 20 times, fill its disk, count the losses (long)
	@$(RUN) tests/reliability/soak.py

lint: setup  ## ruff: rules and format
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check .

# The package is there already, which leaves its extra to install.
$(VENV)/docs-$(KEY): $(VENV)/setup-$(KEY)
	$(TESTED) 'mmcls_involution[docs]'
	@touch $@

docs: $(VENV)/docs-$(KEY)  ## build the documentation site: build/docs/index.html
	@$(RUN) -m sphinx -q -E -W --keep-going -b html -c docs . build/docs && echo build/docs/index.html

bench: setup  ## time involution and RedNet beside their alternatives, short form
	@$(RUN) tools/analysis_tools/benchmark_op.py --image 8x224x224 --rounds 3 && $(RUN) tools/analysis_tools/benchmark_model.py --shape 4x3x224x224 --rounds 3

bench-gpu: setup  ## the tests on a GPU, then all figures of a GPU
	@PYTHON=$(RUN) tools/analysis_tools/benchmark_gpu.sh

paper-table: setup  ## our parameters and FLOPs beside the paper's
	@$(RUN) tools/analysis_tools/paper_table.py

clean:  ## remove the virtual environment and build products
	@[ ! -d '$(VENV)' ] || [ -f '$(VENV)/pyvenv.cfg' ] || { echo '$(VENV) is no virtual environment: it is left, and so is all else'; exit 1; }
	@rm -rf '$(VENV)' build dist mmcls_involution.egg-info mmcls_involution/.mim .pytest_cache .ruff_cache
