"""A checkpoint of each task, configs over the tiny ones, label maps to damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


# What one run trains, and the checkpoint it leaves.
LAST = dict(detector='epoch_1', segmenter='iter_2', classifier='epoch_1')


@pytest.fixture(scope='session')
def trained() -> dict[str, Path]:
    """Work dirs of finished runs, by task; filled by :func:`checkpoint`."""
    return {}


@pytest.fixture
def checkpoint(trained, tool, tmp_path_factory) -> Callable[[str], Path]:
    """Train a task for two iterations, once, and give its checkpoint."""

    def get(task: str) -> Path:
        if task not in trained:
            folder = tmp_path_factory.mktemp(task)
            assert tool('train', task, '--work-dir', folder) == ''
            trained[task] = folder
        return trained[task] / f'{LAST[task]}.pth'

    return get


@pytest.fixture
def edited(tmp_path) -> Callable[[str, str], Path]:
    """Write a config over a tiny one."""

    def write(task: str, text: str) -> Path:
        file = tmp_path / 'edited.py'
        base = f'_base_ = {str(ROOT / "tests" / "tiny" / f"{task}.py")!r}\n'
        file.write_text(text if text.startswith('_base_') else base + text)
        return file

    return write


@pytest.fixture
def seg_copy(seg_root, tmp_path) -> Path:
    return shutil.copytree(seg_root, tmp_path / 'seg')
