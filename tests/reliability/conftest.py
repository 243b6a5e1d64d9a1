"""Running tests/reliability/toy.py in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def build(forget_runs) -> Callable[[Config], Any]:
    """The runner of a config, as ``train.py`` has it but for its checks."""
    from mmcls_involution import compat
    from mmcls_involution.engine.config import build_runner
    from mmcls_involution.engine.loops import resume_exactly
    from mmcls_involution.engine.saving import save_safely

    compat.apply()

    def get(cfg: Config) -> Any:
        forget_runs()
        save_safely(cfg)
        resume_exactly(cfg)
        return build_runner(cfg)

    return get


@pytest.fixture
def train(build) -> Callable[[Config], Any]:
    """Train a config; returns the runner."""

    def run(cfg: Config) -> Any:
        runner = build(cfg)
        runner.train()
        return runner

    return run
