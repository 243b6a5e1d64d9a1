"""A fresh interpreter, for what depends on the order of imports."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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
