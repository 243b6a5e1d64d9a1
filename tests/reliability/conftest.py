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
def train() -> Callable[[Config], Any]:
    """Train a config as ``train.py`` does, without its command line."""
    from mmengine.utils import ManagerMixin

    from mmcls_involution import compat
    from mmcls_involution.engine.config import build_runner
    from mmcls_involution.engine.loops import resume_exactly
    from mmcls_involution.engine.saving import save_safely

    compat.apply()

    def run(cfg: Config) -> Any:
        classes = [ManagerMixin]
        while classes:
            cls = classes.pop()
            cls._instance_dict.clear()
            classes += cls.__subclasses__()
        save_safely(cfg)
        resume_exactly(cfg)
        runner = build_runner(cfg)
        runner.train()
        return runner

    return run
