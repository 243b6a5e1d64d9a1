import subprocess
import sys

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from torch import nn

from mmcls_involution.models import (
    Involution2d,
    InvolutionFCNMaskHead,
    InvolutionFPN,
    InvolutionRPNHead,
)

WEIGHTS = ('weight', 'bias')

RPN = dict(
    type='InvolutionRPNHead',
    in_channels=32,
    feat_channels=32,
    anchor_generator=dict(
        type='AnchorGenerator', scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8]
    ),
)


@pytest.fixture(autouse=True)
def detection_scope():
    """Whatever scope the tests before have left."""
    register_all_modules()


def names(module):
    """State dict names; one involution's names are cut to `.involution`."""
    cut = set()
    for name in module.state_dict():
        for part in ('.conv1.', '.conv2.'):
            name = name.split(part)[0] + '.involution' if part in name else name
        cut.add(name)
    return cut


@pytest.mark.parametrize('extra', [False, 'on_input'])
def test_fpn_exchanges_the_output_layers_of_backbone_levels(extra):
    start = 1 if extra else 0
    neck = InvolutionFPN(
        [16, 32, 48, 64], 32, num_outs=5, start_level=start, add_extra_convs=extra
    )
    kinds = [isinstance(layer, Involution2d) for layer in neck.fpn_convs]
    assert kinds == ([True] * 3 + [False] * 2 if extra else [True] * 4)
    levels = [16, 32, 48, 64][start:]
    assert names(neck) == (
        {f'lateral_convs.{i}.conv.{w}' for i in range(len(levels)) for w in WEIGHTS}
        | {f'fpn_convs.{i}.involution' for i in range(len(levels))}
        | (
            {f'fpn_convs.{i}.conv.{w}' for i in (3, 4) for w in WEIGHTS}
            if extra
            else set()
        )
    )
    sizes = [(17, 9), (9, 5), (5, 3), (3, 2)]
    inputs = [
        torch.randn(2, c, *s) for c, s in zip([16, 32, 48, 64], sizes, strict=True)
    ]
    outs = neck(inputs)
    assert len(outs) == 5 and {out.size(1) for out in outs} == {32}
    assert [out.shape[2:] for out in outs[: 4 - start]] == sizes[start:]
    sum(out.square().mean() for out in outs).backward()
    assert all(p.grad is not None and p.grad.any() for p in neck.parameters())


def test_fpn_is_the_upstream_one_but_for_the_output_layers():
    """With identities as output layers both give the same maps."""
    from mmdet.models.necks import FPN

    ours, theirs = InvolutionFPN([8, 16], 16, 3), FPN([8, 16], 16, 3)
    theirs.lateral_convs.load_state_dict(ours.lateral_convs.state_dict())
    for neck in (ours, theirs):
        neck.fpn_convs = nn.ModuleList([nn.Identity(), nn.Identity()])
    inputs = torch.randn(1, 8, 7, 5), torch.randn(1, 16, 4, 3)
    for a, b in zip(ours(inputs), theirs(inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_fpn_is_found_by_detection_and_segmentation(scope):
    with MODELS.switch_scope_and_registry(scope) as registry:
        cfg = dict(type='InvolutionFPN', in_channels=[16], out_channels=16, num_outs=1)
        assert isinstance(registry.build(cfg), InvolutionFPN)


def test_norm_of_fpn_is_that_of_its_convolutions():
    neck = InvolutionFPN(
        *([16, 32], 16, 4),
        norm_cfg=dict(type='GN', num_groups=2),
        add_extra_convs='on_output',
    )
    normalised = {
        name.removesuffix('.gn')
        for name, module in neck.named_modules()
        if isinstance(module, nn.GroupNorm)
    }
    convolutions = ['lateral_convs.0', 'lateral_convs.1', 'fpn_convs.2', 'fpn_convs.3']
    assert normalised == set(convolutions)
    outs = neck([torch.randn(1, 16, 8, 8), torch.randn(1, 32, 4, 4)])
    assert [out.size(-1) for out in outs] == [8, 4, 2, 1]


@pytest.mark.parametrize('name', ['conv_cfg', 'act_cfg'])
def test_fpn_refuses_what_it_would_ignore(name):
    with pytest.raises(ValueError, match=f'does not take {name}, got .*involution_cfg'):
        InvolutionFPN([16], 16, 1, **{name: dict(type='x')})


def test_rpn_head():
    head = MODELS.build(RPN)
    assert isinstance(head, InvolutionRPNHead)
    involution = head.rpn_conv.state_dict()
    before = {name: value.clone() for name, value in involution.items()}
    head.init_weights()
    assert names(head) == {
        'rpn_conv.involution',
        *(f'{layer}.{w}' for layer in ('rpn_cls', 'rpn_reg') for w in WEIGHTS),
    }
    # As in the official code the involution keeps its own initialization.
    for name, value in head.rpn_conv.state_dict().items():
        assert torch.equal(value, before[name])
    for layer in (head.rpn_cls, head.rpn_reg):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.3)
    scores, boxes = head([torch.randn(2, 32, 9, 7), torch.randn(2, 32, 5, 4)])
    assert [tuple(s.shape) for s in scores] == [(2, 3, 9, 7), (2, 3, 5, 4)]
    assert [tuple(b.shape) for b in boxes] == [(2, 12, 9, 7), (2, 12, 5, 4)]


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'feat_channels': 64}, 'feat_channels equal to in_channels.* 64 and 32'),
        ({'num_convs': 2}, 'does not take num_convs, got 2'),
    ],
)
def test_rpn_head_refuses_what_it_would_ignore(arguments, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build({**RPN, **arguments})


def test_mask_head():
    head = MODELS.build(
        dict(
            type='InvolutionFCNMaskHead',
            num_convs=2,
            in_channels=32,
            conv_out_channels=32,
            num_classes=3,
        )
    )
    assert isinstance(head, InvolutionFCNMaskHead)
    head.init_weights()
    assert names(head) == {
        *(f'convs.{i}.0.involution' for i in range(2)),
        *(f'{layer}.{w}' for layer in ('upsample', 'conv_logits') for w in WEIGHTS),
    }
    assert all(isinstance(layer[1], nn.ReLU) for layer in head.convs)
    masks = head(torch.randn(4, 32, 14, 14))
    assert tuple(masks.shape) == (4, 3, 28, 28)
    masks.square().mean().backward()
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'conv_kernel_size': 5}, 'does not take conv_kernel_size, got 5'),
        ({'conv_cfg': dict(type='DCN')}, 'does not take conv_cfg'),
        ({'norm_cfg': dict(type='BN')}, 'does not take norm_cfg'),
        ({'conv_out_channels': 128}, 'equal to in_channels.* 128 and 256'),
    ],
)
def test_mask_head_refuses_what_it_would_ignore(arguments, message):
    with pytest.raises(ValueError, match=message):
        InvolutionFCNMaskHead(**arguments)


def test_fpn_with_mmseg_alone():
    """MMDetection is hidden; the neck is MMSegmentation's then."""
    pytest.importorskip('mmseg')
    program = """
import importlib.util, sys
sys.modules['mmdet'] = None
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == 'mmdet' else find(name, *a)
import torch
from mmcls_involution import models
assert models.__all__ == ['Involution2d', 'RedNet', 'InvolutionFPN']
neck = models.InvolutionFPN([16, 32], 16, num_outs=2)
levels = neck([torch.rand(1, 16, 9, 8), torch.rand(1, 32, 5, 4)])
print(models.InvolutionFPN.__mro__[1].__module__, [tuple(x.shape) for x in levels])
"""
    result = subprocess.run(
        [sys.executable, '-c', program], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    expected = 'mmseg.models.necks.fpn [(1, 16, 9, 8), (1, 16, 5, 4)]'
    assert result.stdout.splitlines()[-1] == expected
