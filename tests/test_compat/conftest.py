"""A fresh interpreter, for what depends on the order of imports; our operators."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='session')
def run_python() -> Callable[..., str]:
    """Runs code in a new interpreter; gives what it prints."""

    def run(code: str, *paths: Path) -> str:
        path = os.pathsep.join(map(str, (*paths, ROOT)))
        result = subprocess.run(
            [sys.executable, '-c', code],
            env={**os.environ, 'PYTHONPATH': path},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.fixture
def rng(request):
    return np.random.default_rng(request.config.option.seed)


@pytest.fixture
def operators(request, monkeypatch):
    """Puts our operators below ``mmcv.ops``, where mmcv is compiled too."""
    from mmcls_involution.compat.mmcv_ops import lane
    from mmcls_involution.compat.mmcv_ops.operators import OPERATORS

    lane.runs_on.cache_clear()
    if getattr(request, 'param', 'torch') == 'torch':
        monkeypatch.setattr(lane, 'runs_on', lambda device: False)
    elif not lane.runs_on('cpu'):
        pytest.skip("torchvision's compiled operators do not run beside this torch")
    functions = SimpleNamespace(**OPERATORS)
    for name, module in list(sys.modules.items()):
        if name.startswith('mmcv.ops.') and hasattr(module, 'ext_module'):
            monkeypatch.setattr(module, 'ext_module', functions)
