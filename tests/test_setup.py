"""`make setup`: when it installs again, what it mends, and what it refuses.

pip is not run: a script in the environment stands in for Python.
"""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
make_venv = runpy.run_path(str(ROOT / 'tools' / 'make_venv.py'))
# Writes down how it is called; fails where the text of the file `fail` is in the call.
PYTHON = """#!/bin/sh
echo "$*" >> "$0.log"
case "$*" in *"$(cat "$0.fail" 2>/dev/null || echo nothing)"*) exit 1;; esac
"""


@pytest.fixture
def make(tmp_path):
    """Runs `make setup` in an environment that exists; gives the calls of pip."""
    if shutil.which('make') is None:
        pytest.skip('make is not installed')
    python = tmp_path / 'venv' / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(*arguments, fail='', target='setup'):
        log, failing = Path(f'{python}.log'), Path(f'{python}.fail')
        failing.write_text(fail or 'nothing')
        log.unlink(missing_ok=True)
        variables = [f'VENV={tmp_path}/venv', f'PYTHON={sys.executable}', *arguments]
        result = subprocess.run(
            ['make', target, *variables], cwd=ROOT, capture_output=True, text=True
        )
        assert bool(result.returncode) == bool(fail), result.stdout + result.stderr
        lines = log.read_text().splitlines() if log.exists() else []
        return [line for line in lines if line.startswith('-m ')]

    return run


def test_setup_installs_once_for_each_torch(make, tmp_path):
    torch, setuptools, rest, doctor = make()
    assert torch.endswith('install --no-compile torch==2.13.0 torchvision')
    assert setuptools.endswith('--constraint requirements/tested.txt setuptools')
    assert '--constraint requirements/tested.txt' in rest
    assert rest.endswith('--editable .[all,dev]')
    assert doctor == '-m mmcls_involution.doctor'
    assert make() == []
    other = 'TORCH=torch>=2.12,<2.13 --index-url file:///nowhere'
    site = tmp_path / 'venv/lib/python3.11/site-packages'
    (site / 'torch').mkdir(parents=True)
    uninstall, torch, *_ = make(other)
    assert uninstall == '-m pip uninstall --yes torch torchvision'
    assert torch.endswith('torch>=2.12,<2.13 --index-url file:///nowhere torchvision')
    assert make(other) == []
    assert len(make()) == 5  # and back


def test_docs_are_installed_once_and_built_each_time(make):
    install, build = make(target='docs')[-2:]
    constraint = '--constraint requirements/tested.txt'
    assert install.endswith(f'{constraint} mmcls_involution[docs]')
    assert build.startswith('-m sphinx -q -E -W ') and build.endswith(' . build/docs')
    assert make(target='docs') == [build]
    assert len(make('TORCH=torch==2.12.1', target='docs')) == 6


def test_setup_goes_on_where_it_failed(make):
    assert len(make(fail='--editable')) == 3
    assert len(make(fail='mmcls_involution.doctor')) == 3
    assert len(make()) == 3
    assert make() == []


def test_setup_keeps_a_compiled_mmcv(make, tmp_path):
    info = tmp_path / 'venv/lib/python3.11/site-packages/mmcv-2.1.0.dist-info'
    info.mkdir(parents=True)
    for name in ('RECORD', 'INSTALLER'):
        (info / name).touch()
    assert '--editable .[det,seg,cls,dev]' in make()[2]


def test_what_an_interrupted_pip_left_is_removed(tmp_path, capsys):
    whole, halves = ['six-1.dist-info', 'six'], ['numpy-2.dist-info', '~orch']
    # pip had begun to remove torch, and to write numpy
    for name in (*whole, *halves, 'torch-2.dist-info'):
        (tmp_path / name).mkdir()
    for name in ('six-1.dist-info', 'torch-2.dist-info'):
        (tmp_path / name / 'RECORD').touch()
        (tmp_path / name / 'INSTALLER').touch()
    make_venv['remove_halves'](tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == set(whole)
    assert capsys.readouterr().out.count('an interrupted pip left') == 3


def test_old_python_and_other_folders_are_refused(tmp_path):
    with pytest.raises(SystemExit, match='make setup PYTHON='):
        make_venv['check_python']((3, 9))
    (tmp_path / 'thesis.tex').touch()
    with pytest.raises(SystemExit, match='no virtual environment'):
        make_venv['main'](tmp_path)
    assert (tmp_path / 'thesis.tex').exists()


@pytest.fixture
def begun(tmp_path):
    """What venv has made before it writes pyvenv.cfg, in the place of `--clear`."""
    for name in ('bin', 'include', 'lib/python3.11/site-packages'):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / 'lib64').symlink_to('lib')
    return tmp_path


@pytest.mark.parametrize('name', ['bin/tool', 'lib/python3.11/site-packages/six.py'])
def test_the_prefix_of_a_program_is_left_alone(begun, name, monkeypatch):
    monkeypatch.setattr(subprocess, 'call', lambda *_, **__: pytest.fail('cleared'))
    monkeypatch.setitem(make_venv['main'].__globals__, 'works', lambda _: False)
    for link in (False, True):
        entry = begun / name
        entry.symlink_to(begun.parent) if link else entry.touch()
        with pytest.raises(SystemExit, match='no virtual environment'):
            make_venv['main'](begun)
        entry.unlink()


@pytest.mark.parametrize('config', [False, True])
def test_what_an_interrupted_venv_left_is_made_anew(begun, config, monkeypatch):
    if config:
        for name in ('pyvenv.cfg', 'bin/python'):
            (begun / name).touch()
    calls = []
    monkeypatch.setattr(subprocess, 'call', lambda command: calls.append(command))
    make_venv['make'](begun)
    assert calls == [[sys.executable, '-m', 'venv', '--clear', str(begun)]]
