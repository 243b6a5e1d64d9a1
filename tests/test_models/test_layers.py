import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from torch import nn

import mmcls_involution.models  # noqa: F401 (registers)
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


@pytest.mark.parametrize(
    'cfg, number',
    [
        (dict(type='RedNet', depth=26, base_channels=16, stem_kernel_size=3), 9),
        (dict(type='InvolutionFPN', in_channels=[16, 32], out_channels=16), 2),
        (dict(type='InvolutionFCNMaskHead', in_channels=16, conv_out_channels=16), 4),
        (
            dict(
                type='InvolutionRPNHead',
                in_channels=16,
                feat_channels=16,
                anchor_generator=dict(
                    type='AnchorGenerator', scales=[8], ratios=[1.0], strides=[4]
                ),
            ),
            1,
        ),
    ],
    ids=lambda value: value['type'] if isinstance(value, dict) else '',
)
def test_identity_survives_what_initializes_every_convolution(cfg, number):
    pytest.importorskip('mmdet')
    if cfg['type'] == 'InvolutionFPN':
        cfg = dict(cfg, num_outs=3, add_extra_convs='on_input')
    init_default_scope('mmdet')
    model = MODELS.build(dict(cfg, involution_cfg=dict(init='identity')))
    with torch.no_grad():  # as if it had been another one
        for parameter in model.parameters():
            parameter.fill_(7)
    model.init_weights()
    involutions = [m for m in model.modules() if isinstance(m, ops.Involution2d)]
    assert len(involutions) == number
    for module in involutions:
        x = torch.randn(1, module.channels, 4, 6)
        expected = x[..., :: module.stride, :: module.stride]
        torch.testing.assert_close(module.eval()(x), expected, rtol=0, atol=0)
