"""Tiny models of the three toolboxes, with random weights in a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmcls_involution import compat

compat.apply()

from mmengine.config import Config  # noqa: E402
from mmengine.registry import MODELS, init_default_scope  # noqa: E402

TINY = Path(__file__).parents[1] / 'tiny'
KINDS = ('detector', 'segmenter', 'classifier')


@pytest.fixture(scope='session')
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints by the names of tiny configs; they hold no class names."""
    root, files = tmp_path_factory.mktemp('weights'), {}
    for kind in KINDS:
        cfg = Config.fromfile(TINY / f'{kind}.py')
        init_default_scope(cfg.default_scope)
        model = MODELS.build(cfg.model)
        model.init_weights()
        files[kind] = str(root / f'{kind}.pth')
        torch.save(dict(state_dict=model.state_dict()), files[kind])
    return files
