"""Fixtures of the tests of checkpoints."""

from __future__ import annotations

import pytest
import torch
from weights_cases import SLIM, Weights

from mmcls_involution.models import RedNet


@pytest.fixture
def weights() -> Weights:
    """Of a slim classifier; test_rednet.py holds the names to the official ones."""
    torch.manual_seed(0)
    backbone = RedNet(**SLIM).state_dict()
    state = {
        f'backbone.{name}': torch.rand_like(value)
        if value.is_floating_point()
        else torch.tensor(7)
        for name, value in backbone.items()
    }
    state['head.fc.weight'], state['head.fc.bias'] = torch.rand(2, 512), torch.rand(2)
    return state
