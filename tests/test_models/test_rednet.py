import copy

import pytest
import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.model import PretrainedInit
from mmengine.registry import MODELS
from torch import nn

from mmcls_involution.models import Involution2d, RedNet
from mmcls_involution.models.backbones import rednet

SLIM = dict(depth=26, base_channels=16, stem_channels=32)


def involutions(model):
    return [module for module in model.modules() if isinstance(module, Involution2d)]


@pytest.mark.parametrize('spelling', ['RedNet', 'mmcls_involution.RedNet'])
@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmseg', 'mmpretrain'])
def test_every_toolbox_builds_it(spelling, scope):
    with MODELS.switch_scope_and_registry(scope) as registry:
        assert isinstance(registry.build(dict(type=spelling, **SLIM)), RedNet)


@pytest.mark.parametrize(
    'depth, millions',
    # Of the classifiers, from the official README.
    [(26, 9.23), (38, 12.39), (50, 15.54), (101, 25.65), (152, 33.99)],
)
def test_depths_have_the_official_size(depth, millions):
    with torch.device('meta'):
        parameters = [*RedNet(depth).parameters(), *nn.Linear(2048, 1000).parameters()]
    count = sum(parameter.numel() for parameter in parameters)
    assert count / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize('size', [(1, 1), (32, 32), (33, 47), (65, 30)])
@pytest.mark.parametrize('style', ['pytorch', 'caffe'])
def test_levels_of_every_size(size, style):
    model = RedNet(**SLIM, out_indices=(0, 1, 2, 3), style=style).eval()
    levels = model(torch.randn(2, 3, *size))
    assert isinstance(levels, tuple)
    for i, level in enumerate(levels):
        stride = 4 * 2**i
        expected = (2, 64 * 2**i, *(-(-side // stride) for side in size))
        assert tuple(level.shape) == expected


@pytest.mark.parametrize('avg_down', [False, True])
def test_dilation_keeps_the_resolution(avg_down):
    model = RedNet(
        **SLIM,
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        out_indices=(1, 3),
        avg_down=avg_down,
    ).eval()
    shallow, deep = model(torch.randn(1, 3, 65, 50))
    assert shallow.shape[2:] == deep.shape[2:] == (9, 7)
    assert [module.dilation for module in involutions(model.layer4)] == [4]


def test_gradients_are_those_of_the_papers_pseudo_code(monkeypatch):
    """Of the whole network; autograd alone derives the pseudo-code."""
    ours = RedNet(**SLIM, out_indices=(0, 1, 2, 3))
    for norm in ours.modules():  # else the residual branches start as zero
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    theirs = copy.deepcopy(ours)
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)

    def train(model: RedNet) -> list[torch.Tensor]:
        outs = model.double().train()(x)
        sum(out.square().sum() for out in outs).backward()
        return [out.detach() for out in outs]

    def pseudo_code(self: Involution2d, x: torch.Tensor) -> torch.Tensor:
        k, stride = self.kernel_size, self.stride
        y = nn.functional.avg_pool2d(x, stride, stride) if stride > 1 else x
        kernels = self.conv2(self.conv1(y)).unflatten(1, (-1, k * k))
        columns = nn.functional.unfold(x, k, 1, (k - 1) // 2, stride)
        shape = (len(x), kernels.shape[1], -1, *kernels.shape[2:])
        return (kernels.unsqueeze(2) * columns.view(shape)).sum(3).flatten(1, 2)

    levels = train(ours)
    monkeypatch.setattr(Involution2d, 'forward', pseudo_code)
    torch.testing.assert_close(levels, train(theirs), rtol=1e-10, atol=1e-10)
    for (name, parameter), other in zip(
        ours.named_parameters(), theirs.parameters(), strict=True
    ):
        assert (parameter.grad - other.grad).norm() < 1e-10 * other.grad.norm(), name


def test_every_parameter_is_trained():
    model = RedNet(**SLIM)
    model.init_weights()
    nn.init.ones_(model.layer1[0].bn3.weight)
    for name in ('layer2', 'layer3', 'layer4'):
        for block in getattr(model, name):
            nn.init.ones_(block.bn3.weight)
    model(torch.randn(2, 3, 64, 48))[0].square().mean().backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []


@pytest.mark.parametrize('frozen_stages', range(-1, 5))
def test_frozen_stages(frozen_stages):
    model = RedNet(**SLIM, frozen_stages=frozen_stages).train()
    stages = [model.stem, model.layer1, model.layer2, model.layer3, model.layer4]
    for i, stage in enumerate(stages):
        frozen = i <= frozen_stages
        assert all(p.requires_grad != frozen for p in stage.parameters())
        assert all(module.training != frozen for module in stage.modules())


def test_norm_eval_reaches_the_involutions():
    model = RedNet(**SLIM, norm_eval=True).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
    assert model.training and model.layer1.training


@pytest.mark.parametrize('norm_eval', [False, True])
@pytest.mark.parametrize('passes', ['one', 'two', 'of a gradient'])
def test_recomputing_changes_nothing(norm_eval, passes):
    """With one backward pass, two through one graph, and one through the first."""
    model = RedNet(**SLIM, norm_eval=norm_eval, with_cp=True).double()
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if hasattr(module, 'with_cp'):
            module.with_cp = False
    x = torch.randn(2, 3, 33, 31, dtype=torch.float64)
    for network in (model, plain):
        network.train()
        last = network(x)[-1]
        if passes == 'of a gradient':  # a penalty on the gradient, as GANs have it
            weight = network.layer1[0].conv1.weight
            (slope,) = torch.autograd.grad(last.mean(), weight, create_graph=True)
            slope.square().sum().backward()
        else:
            last.square().mean().backward(retain_graph=passes == 'two')
            if passes == 'two':
                last.mean().backward()
    found = 0
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            found += 1
            torch.testing.assert_close(ours.grad, theirs.grad)
    assert found > 20
    for (name, ours), theirs in zip(
        model.named_buffers(), plain.buffers(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_recomputing_keeps_nothing_of_the_stem():
    """Of its 32 channels at half the image's size; 64 at a quarter come out of it."""
    x, kept = torch.randn(1, 3, 64, 48), []

    def pack(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    for with_cp in (True, False):
        kept.clear()
        model = RedNet(**SLIM, with_cp=with_cp).train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x)
        assert any(shape[2:] == (32, 24) for shape in kept) != with_cp


def test_norm_cfg_reaches_the_involutions_unless_they_have_their_own():
    norm_cfg = dict(type='GN', num_groups=2)
    model = RedNet(**SLIM, norm_cfg=norm_cfg)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    model = RedNet(
        **SLIM, norm_cfg=norm_cfg, involution_cfg=dict(norm_cfg=dict(type='BN'))
    )
    for involution in involutions(model):
        assert isinstance(involution.conv1.bn, nn.BatchNorm2d)
    assert isinstance(model.stem[2], nn.BatchNorm2d)
    assert isinstance(model.layer1[0].bn2, nn.GroupNorm)


def test_involution_cfg_reaches_every_involution():
    cfg = dict(kernel_size=5, group_channels=8, reduction_ratio=2)
    model = RedNet(**SLIM, stem_kernel_size=3, involution_cfg=cfg)
    stem, *others = involutions(model)
    assert stem.kernel_size == 3 and {m.kernel_size for m in others} == {5}
    assert {m.group_channels for m in involutions(model)} == {8}
    assert {m.reduction_ratio for m in involutions(model)} == {2}


@pytest.mark.parametrize('generator', ['linear', 'dot_product', 'attention'])
def test_every_generator_trains_every_parameter(generator):
    cfg = dict(generator=generator)
    model = RedNet(**SLIM, zero_init_residual=False, involution_cfg=cfg)
    model.init_weights()
    assert {m.generator for m in involutions(model)} == {generator}
    model(torch.randn(2, 3, 65, 47))[0].square().mean().backward()
    without = [n for n, p in model.named_parameters() if not p.grad.any()]
    assert without == []


def test_stem_of_convolutions_is_that_of_resnet():
    """The same layers as MMPretrain's, so a deep ResNet's stem gives our output."""
    resnet = pytest.importorskip('mmpretrain.models').ResNetV1d(depth=50)
    resnet.eval()  # gives None
    model = RedNet(**{**SLIM, 'stem_channels': 64}, stem_kernel_size=None).eval()
    assert len(involutions(model)) == len(involutions(RedNet(**SLIM))) - 1
    for norm in resnet.stem.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight)
            nn.init.uniform_(norm.bias)
    theirs = resnet.stem.state_dict().values()
    state = dict(zip(model.stem.state_dict(), theirs, strict=True))
    model.stem.load_state_dict(state)
    x = torch.randn(1, 3, 33, 46)
    torch.testing.assert_close(model.stem(x), resnet.stem(x))


def test_blocks_start_as_the_identity():
    for zero in (True, False):
        model = RedNet(**SLIM, zero_init_residual=zero)
        model.init_weights()
        assert (model.layer1[0].bn3.weight == (0 if zero else 1)).all()


def test_fuse_conv_bn_keeps_the_output():
    model = RedNet(**SLIM).eval()
    x = torch.randn(1, 3, 40, 33)
    expected = model(x)[0]
    fused = fuse_conv_bn(model)
    assert isinstance(fused.layer1[0].conv2.conv1.bn, nn.Identity)
    torch.testing.assert_close(fused(x)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize(
    'layout', [torch.contiguous_format, torch.channels_last], ids=str
)
def test_features_lie_in_memory_as_the_images(layout, training):
    """Whatever the network uses within: RoIAlign reads contiguous memory alone."""
    model = RedNet(**SLIM, out_indices=(0, 1, 2, 3)).train(training)
    x = torch.randn(2, 3, 70, 65).contiguous(memory_format=layout)
    for level in model(x):
        assert level.is_contiguous(memory_format=layout)
        assert level.shape[2] > 1  # else one layout is the other


@pytest.fixture
def checkpoint(tmp_path):
    state = {f'backbone.{k}': v for k, v in RedNet(**SLIM).state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / 'classifier.pth')
    return str(tmp_path / 'classifier.pth')


@pytest.mark.parametrize('kind', ['Pretrained', 'mmengine.Pretrained', PretrainedInit])
def test_pretrained_weights_are_loaded(kind, checkpoint):
    start = dict(type=kind, checkpoint=checkpoint, prefix='backbone.')
    model = RedNet(**SLIM, zero_init_residual=True, init_cfg=start)
    model.init_weights()
    model.init_weights()  # nothing more is done, and nothing said to be missing
    theirs = torch.load(checkpoint)['state_dict']
    for name, value in model.state_dict().items():
        assert torch.equal(value, theirs[f'backbone.{name}'])


def test_pretrained_weights_under_another_prefix_are_refused(checkpoint):
    model = RedNet(**SLIM, init_cfg=dict(type='Pretrained', checkpoint=checkpoint))
    with pytest.raises(ValueError, match='no weights of RedNet under the prefix None'):
        model.init_weights()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('size', [(64, 64), (37, 51)])
@pytest.mark.parametrize(
    'small, large, message',
    [
        (dict(stem_kernel_size=3), dict(stem_kernel_size=7), '3 into 7'),
        (dict(stem_kernel_size=1), dict(stem_kernel_size=3), '1 into 3'),
        (
            dict(stem_kernel_size=3, involution_cfg=dict(kernel_size=5)),
            dict(stem_kernel_size=3, involution_cfg=dict(kernel_size=9)),
            '5 into 9',
        ),
        (
            dict(involution_cfg=dict(kernel_size=1, generator='linear')),
            dict(stem_kernel_size=7, involution_cfg=dict(generator='linear')),
            '1 into 7, 3 into 7',
        ),
        (
            dict(dilations=(1, 1, 2, 4), involution_cfg=dict(kernel_size=3)),
            dict(dilations=(1, 1, 2, 4), involution_cfg=dict(kernel_size=5)),
            '3 into 5',
        ),
    ],
)
def test_smaller_kernels_in_larger_ones_compute_the_same(
    small, large, message, size, dtype, monkeypatch
):
    lines = []
    monkeypatch.setattr(rednet, 'print_log', lambda line, **_: lines.append(line))
    options = dict(SLIM, out_indices=(0, 1, 2, 3))
    theirs = RedNet(**options, **small).to(dtype)
    x = torch.randn(2, 3, *size, dtype=dtype)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1  # the statistics of this batch
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias)
    theirs(x)
    ours = nn.ModuleDict(dict(backbone=RedNet(**options, **large))).to(dtype)
    state = {f'backbone.{name}': v for name, v in theirs.state_dict().items()}
    before = {name: value.shape for name, value in state.items()}
    ours.load_state_dict(state)
    assert {name: value.shape for name, value in state.items()} == before
    with torch.no_grad():
        for a, b in zip(theirs.eval()(x), ours.backbone.eval()(x), strict=True):
            assert torch.equal(a, b)
    (line,) = lines
    assert f'({message}), zeros around them, in ' in line


def test_weights_of_a_smaller_stem_through_a_config(checkpoint):
    start = dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.')
    model = RedNet(**SLIM, stem_kernel_size=7, init_cfg=start)
    model.init_weights()
    theirs = torch.load(checkpoint)['state_dict']
    taps = model.stem[1].conv2.conv.weight.unflatten(0, (-1, 7, 7))
    expected = theirs['backbone.stem.1.conv2.conv.weight'].unflatten(0, (-1, 3, 3))
    assert torch.equal(taps[:, 2:5, 2:5], expected)
    assert taps.count_nonzero() == expected.count_nonzero()


@pytest.mark.parametrize(
    'large, small, key',
    [
        (dict(stem_kernel_size=7), {}, r'stem\.1.*stem involutions'),
        (
            {},
            dict(involution_cfg=dict(kernel_size=5), stem_kernel_size=3),
            r'layer1\.0\.conv2\.conv2\.conv.weight is \(49, .*their involutions',
        ),
    ],
)
def test_larger_kernels_are_refused(large, small, key):
    state = RedNet(**SLIM, **large).state_dict()
    with pytest.raises(ValueError, match=f'{key} differ.*not the other way round'):
        RedNet(**SLIM, **small).load_state_dict(state)


@pytest.mark.parametrize(
    'change, key',
    [
        (dict(stem_kernel_size=None), r'conv1.conv.weight is \(4, 16, 1, 1\).*absent'),
        (dict(involution_cfg=dict(generator='attention')), 'conv1.conv.*absent'),
        (dict(involution_cfg=dict(generator='linear')), 'conv1.conv.*absent'),
        (dict(involution_cfg=dict(reduction_ratio=2)), r'conv1.conv.*\(8, 16, 1, 1\)'),
    ],
)
def test_weights_for_another_kind_of_stem_are_refused(change, key, checkpoint):
    state = torch.load(checkpoint)['state_dict']
    model = nn.ModuleDict(dict(backbone=RedNet(**SLIM, **change)))
    with pytest.raises(ValueError, match=rf'backbone\.stem\.1\.{key}.*involution_cfg'):
        model.load_state_dict(state)
    # and the other way round
    other = nn.ModuleDict(dict(backbone=RedNet(**SLIM)))
    with pytest.raises(ValueError, match=r'backbone\.stem\.1\..*stem involutions'):
        other.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'depth': 18}, r'depth must be one of \[26, 38, 50, 101, 152\], got 18'),
        ({'num_stages': 5}, 'num_stages must be 1, 2, 3 or 4, got 5'),
        ({'strides': (1, 2)}, r'strides must have one entry per stage, 4, got \(1, 2'),
        ({'dilations': (1,)}, 'dilations must have one entry per stage'),
        ({'out_indices': (4,)}, r'stages from 0 to 3, got \(4,\)'),
        ({'out_indices': (-1,)}, r'stages from 0 to 3, got \(-1,\)'),
        ({'out_indices': ()}, r'stages from 0 to 3, got \(\)'),
        ({'out_indices': 3}, 'stages from 0 to 3, got 3'),
        ({'strides': 2}, 'strides must have one entry per stage, 4, got 2'),
        (
            {'strides': (1, 2, '2', 2)},
            r"strides\[2\] must be a positive int, got '2'",
        ),
        ({'dilations': (1, 1, 1, 0)}, r'dilations\[3\] must be a positive int, got 0'),
        ({'in_channels': 0}, 'in_channels must be a positive int, got 0'),
        ({'in_channels': True}, 'in_channels must be a positive int, got True'),
        ({'base_channels': 64.0}, 'base_channels must be a positive int, got 64.0'),
        ({'style': 'tensorflow'}, "'pytorch' or 'caffe', got 'tensorflow'"),
        ({'frozen_stages': 5}, 'frozen_stages must be -1 to 4, got 5'),
        ({'stem_channels': 33}, 'stem_channels must be even, got 33'),
        ({'base_channels': 24}, 'multiple of group_channels, got 24'),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RedNet(**{**SLIM, **arguments})


@pytest.mark.parametrize(
    'images, message',
    [
        (torch.rand(3, 32, 40), r'must be \[N, C, H, W\], got shape \(3, 32, 40\)'),
        (torch.rand(1, 3, 0, 40), 'at least 1x1 in size, got 0x40'),
        (torch.ones(1, 3, 32, 40, dtype=torch.uint8), 'must be one of .*torch.uint8'),
    ],
)
def test_wrong_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        RedNet(26)(images)


def test_three_stages():
    model = RedNet(
        **SLIM, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,)
    )
    (level,) = model.eval()(torch.randn(1, 3, 64, 48))
    assert not hasattr(model, 'layer4')
    assert level.shape[2:] == (4, 3)
    assert level.shape[1] == model.layer3[-1].conv3.out_channels


def test_conv_cfg_reaches_every_convolution_but_the_generators():
    model = RedNet(**SLIM, conv_cfg=dict(type='ConvAWS'))
    kinds = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    ours = {name for name, kind in kinds.items() if kind != 'ConvAWS2d'}
    assert ours == {
        name for name in kinds if '.conv2.conv' in name or 'stem.1.' in name
    }
