import subprocess
import sys

import pytest
import torch
from torch import nn

from mmcls_involution.ops import Involution2d


@pytest.mark.parametrize('kernel_size', [1, 3, 7])
@pytest.mark.parametrize('stride, dilation', [(1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize('size', [(1, 1), (2, 3), (9, 8), (14, 7)])
def test_every_size_gives_the_size_of_a_convolution(
    kernel_size, stride, dilation, size
):
    x = torch.randn(2, 8, *size)
    module = Involution2d(
        8, kernel_size, stride, dilation, group_channels=4, reduction_ratio=2
    ).eval()
    padding = dilation * (kernel_size - 1) // 2
    conv = nn.Conv2d(8, 8, kernel_size, stride, padding, dilation)
    assert module(x).shape == conv(x).shape


def test_kernels_come_from_the_pooled_input():
    """Even sizes, where pooling with and without ceil_mode agree."""
    module = Involution2d(8, 3, stride=2, group_channels=4, reduction_ratio=2).eval()
    x = torch.randn(2, 8, 6, 4)
    pooled = nn.functional.avg_pool2d(x, 2, 2)
    weight = module.conv2(module.conv1(pooled)).view(2, 2, 1, 9, 3, 2)
    columns = nn.functional.unfold(x, 3, 1, 1, 2).view(2, 2, 4, 9, 3, 2)
    torch.testing.assert_close(module(x), (columns * weight).sum(3).view(2, 8, 3, 2))


def test_state_dict_has_the_official_names():
    state = Involution2d(32, stride=2).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        'conv1.conv.weight': (8, 32, 1, 1),
        'conv1.bn.weight': (8,),
        'conv1.bn.bias': (8,),
        'conv1.bn.running_mean': (8,),
        'conv1.bn.running_var': (8,),
        'conv1.bn.num_batches_tracked': (),
        'conv2.conv.weight': (98, 8, 1, 1),
        'conv2.conv.bias': (98,),
    }


def test_norm_and_activation_are_exchangeable():
    module = Involution2d(
        16, norm_layer=lambda features: nn.GroupNorm(2, features), act_layer=nn.SiLU
    )
    assert isinstance(module.conv1.bn, nn.GroupNorm)
    assert isinstance(module.conv1.activate, nn.SiLU)
    module(torch.randn(1, 16, 1, 1)).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_trains_under_autocast(dtype):
    module = Involution2d(32, stride=2)
    with torch.autocast('cpu', dtype=dtype):
        out = module(torch.randn(2, 32, 9, 7))
    assert out.dtype == dtype
    out.float().square().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize('stride', [1, 2])
def test_export_with_dynamic_sizes(stride):
    module = Involution2d(16, stride=stride).eval()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        module,
        (torch.randn(2, 16, 9, 7),),
        dynamic_shapes=({0: auto, 2: auto, 3: auto},),
    ).module()
    for shape in [(2, 16, 9, 7), (3, 16, 8, 12)]:
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), module(x))


def test_compile_without_graph_breaks_for_changing_sizes():
    module = Involution2d(16, 3, stride=2)
    # Inductor's C++ compilation takes minutes and none of it is ours.
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend='aot_eager')
    for size in [(9, 7), (6, 10)]:
        x = torch.randn(2, 16, *size)
        torch.testing.assert_close(compiled(x), module(x))


def test_channels_last_stays_channels_last():
    module = Involution2d(32).to(memory_format=torch.channels_last)
    x = torch.randn(2, 32, 9, 7)
    out = module(x.contiguous(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, module(x))


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'channels': 24}, 'multiple of group_channels, got 24 channels.* of 16'),
        ({'channels': 8}, 'multiple of group_channels, got 8 channels'),
        ({'channels': 2, 'group_channels': 2}, 'at least reduction_ratio, got 2'),
        ({'channels': 16, 'kernel_size': 4}, 'kernel_size must be odd.*got 4'),
        ({'channels': 16, 'stride': 0}, 'stride must be a positive int, got 0'),
        ({'channels': 16, 'dilation': 1.0}, 'dilation must be a positive int, got 1.0'),
        ({'channels': '16'}, "channels must be a positive int, got '16'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Involution2d(**arguments)


def test_repr_shows_the_arguments():
    text = repr(Involution2d(32, kernel_size=5, stride=2))
    assert 'Involution2d(\n  32, kernel_size=5, stride=2, dilation=1' in text


def test_ops_import_torch_alone():
    """Whatever else is installed, importing the operator does not touch it."""
    code = (
        'import sys; import mmcls_involution.ops; '
        'print([m for m in sys.modules if m.split(".")[0] in '
        '("mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain", "cv2", "torchvision")])'
    )
    out = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == '[]'
