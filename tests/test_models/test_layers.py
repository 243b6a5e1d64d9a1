import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from mmcls_involution import ops


@pytest.mark.parametrize('spelling', ['Involution2d', 'mmcls_involution.Involution2d'])
def test_built_from_a_config(spelling):
    module = MODELS.build(
        dict(
            type=spelling,
            channels=16,
            kernel_size=3,
            norm_cfg=dict(type='GN', num_groups=2),
            act_cfg=dict(type='GELU'),
        )
    )
    assert isinstance(module, ops.Involution2d)
    assert isinstance(module.conv1.bn, nn.GroupNorm)
    assert isinstance(module.conv1.activate, nn.GELU)


def test_default_is_the_module_of_ops():
    ours = MODELS.build(dict(type='Involution2d', channels=16))
    plain = ops.Involution2d(16)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 16, 5, 6)
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x))
