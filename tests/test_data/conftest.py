"""The full check, and small data sets to damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from check_cases import CONFIGS


@pytest.fixture
def run(command, tmp_path) -> Callable[..., list[tuple]]:
    """Check data with one of CONFIGS; give the rows of ``--out``: rule, place, detail.

    The exit code must agree with them.
    """

    def check(
        name: str, root: Path, *options: str, split: str = 'train', text: str = ''
    ) -> list[tuple]:
        config, out = tmp_path / f'{name}.py', tmp_path / 'findings.txt'
        config.write_text((text or CONFIGS[name]).replace('{root}', str(root)))
        flags = ['--workers', 1, '--out', out, '--split', split]
        if options:
            flags += ['--cfg-options', *options]
        code = command('check', config, *flags)
        assert code in ('', '1'), code
        rows = [tuple(line.split('\t')[1:]) for line in out.read_text().splitlines()]
        assert bool(code) == bool(rows)
        return rows

    return check


@pytest.fixture
def coco(coco_root, tmp_path) -> Path:
    return shutil.copytree(coco_root, tmp_path / 'coco')


@pytest.fixture
def cls(cls_root, tmp_path) -> Path:
    return shutil.copytree(cls_root, tmp_path / 'cls')
