"""Recipes: involutions in networks of MMDetection, by conv_cfg and by a swap."""

import pytest
import torch
from mmcv.cnn import ConvModule, build_conv_layer
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from torch import nn

from mmcls_involution import ops
from mmcls_involution.models.layers import Involution2d, InvolutionConv

CONV = dict(type='InvolutionConv')
RETINA_HEAD = dict(
    type='RetinaHead',
    num_classes=16,
    in_channels=16,
    feat_channels=16,
    stacked_convs=2,
    anchor_generator=dict(
        type='AnchorGenerator', scales=[8], ratios=[1.0], strides=[8, 16]
    ),
)


@pytest.fixture(autouse=True)
def detection_scope():
    """Whatever scope the tests before have left."""
    register_all_modules()


def train_two_steps(model, loss):
    """SGD; the loss stays finite, and every involution learns."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        value = loss()
        assert torch.isfinite(value)
        value.backward()
        optimizer.step()
    spans = [p for n, p in model.named_parameters() if 'involution.conv2' in n]
    assert spans and all(p.grad.abs().max() > 0 for p in spans)


def test_conv_cfg_makes_involutions_and_leaves_1x1_and_groups():
    module = ConvModule(16, 32, 5, 2, 2, conv_cfg=CONV, norm_cfg=dict(type='BN'))
    assert isinstance(module.conv, InvolutionConv)
    assert isinstance(module.conv.involution, Involution2d)
    assert module.conv.bias is None and module.kernel_size == (5, 5)
    module.init_weights()
    assert module(torch.rand(2, 16, 9, 14)).shape == (2, 32, 5, 7)
    assert type(build_conv_layer(CONV, 16, 32, 1)) is nn.Conv2d
    assert type(build_conv_layer(CONV, 16, 16, 3, groups=16)) is nn.Conv2d
    with pytest.raises(ValueError, match='its padding is'):
        build_conv_layer(CONV, 16, 16, 3)


def test_conv_cfg_passes_the_arguments_of_the_involution():
    cfg = dict(
        CONV,
        involution_cfg=dict(
            kernel_size=7, group_channels=8, norm_cfg=dict(type='GN', num_groups=2)
        ),
    )
    layer = build_conv_layer(cfg, 16, 16, 3, padding=1).involution
    assert (layer.kernel_size, layer.group_channels) == (7, 8)
    assert isinstance(layer.conv1.bn, nn.GroupNorm)


def test_identity_survives_the_initialization_around_it():
    cfg = dict(CONV, involution_cfg=dict(init='identity'))
    model = MODELS.build(
        dict(type='ResNet', depth=18, base_channels=16, stem_channels=16, conv_cfg=cfg)
    )
    model.init_weights()
    x = torch.rand(1, 16, 5, 6)
    assert torch.equal(model.layer1[0].conv1.involution(x), x)


def test_identity_in_a_head_that_initializes_every_convolution():
    """What docs/inference.md has for RetinaNet's."""
    cfg = dict(CONV, involution_cfg=dict(init='identity'))
    override = [
        dict(type='Normal', name='retina_cls', std=0.01, bias_prob=0.01),
        dict(type='Normal', name='retina_reg', std=0.01),
    ]
    init_cfg = dict(type='Normal', std=0.01, override=override)
    x = torch.rand(1, 16, 5, 6)
    for options, kept in ((dict(init_cfg=init_cfg), True), (dict(), False)):
        head = MODELS.build(dict(RETINA_HEAD, conv_cfg=cfg, **options))
        head.init_weights()
        for conv in (*head.cls_convs, *head.reg_convs):
            assert torch.equal(conv.conv.involution(x), x) == kept
        assert head.retina_cls.bias.sigmoid().allclose(torch.tensor(0.01))
        assert head.retina_reg.weight.std() < 0.02


def test_resnet_by_conv_cfg():
    model = MODELS.build(
        dict(type='ResNet', depth=18, base_channels=16, stem_channels=16, conv_cfg=CONV)
    )
    model.init_weights()
    assert sum(isinstance(m, InvolutionConv) for m in model.modules()) == 17
    x = torch.rand(2, 3, 64, 64)
    assert [f.shape[2] for f in model(x)] == [16, 8, 4, 2]
    train_two_steps(model, lambda: sum(f.square().mean() for f in model(x)))


@pytest.mark.parametrize('by', ['conv_cfg', 'swap'])
def test_retinanet_head(by):
    if by == 'conv_cfg':
        head = MODELS.build(dict(RETINA_HEAD, conv_cfg=CONV))
        head.init_weights()
    else:
        head = MODELS.build(RETINA_HEAD)
        head.init_weights()
        bias = head.retina_cls.bias.clone()
        levels = [torch.rand(1, 16, size, size) for size in (8, 4)]
        table = ops.swap_convolutions(
            head, lambda name, conv: '_convs.' in name, inputs=(levels,)
        )
        assert len(table.swapped) == 4
        assert torch.equal(head.retina_cls.bias, bias)
    assert type(head.retina_cls) is nn.Conv2d
    features = [torch.rand(2, 16, size, size) for size in (8, 4)]
    train_two_steps(
        head, lambda: sum(t.square().mean() for ts in head(features) for t in ts)
    )


@pytest.mark.parametrize(
    'backbone',
    [
        dict(type='CSPDarknet', deepen_factor=0.33, widen_factor=0.25),  # YOLOX
        dict(type='CSPNeXt', deepen_factor=0.167, widen_factor=0.25),  # RTMDet
    ],
    ids=lambda cfg: cfg['type'],
)
def test_backbones_of_yolox_and_rtmdet(backbone):
    model = MODELS.build(backbone)
    model.init_weights()
    x = torch.rand(2, 3, 64, 64)
    table = ops.swap_convolutions(model, inputs=x)
    assert table.parameters[1] < table.parameters[0]
    assert 'stage4.0.conv' in table.swapped
    train_two_steps(model, lambda: sum(f.square().mean() for f in model(x)))
