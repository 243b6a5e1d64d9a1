import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from op_cases import backend_name, every_generator
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from mmcls_involution.ops import Involution2d, involution2d
from mmcls_involution.ops import fused as fused_form
from mmcls_involution.ops.backends.tiled import generate

OTHERS = ('linear', 'dot_product', 'attention')


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
    columns = F.unfold(x, 3, 1, 1, 2).view(2, 2, 4, 9, 3, 2)
    torch.testing.assert_close(module(x), (columns * weight).sum(3).view(2, 8, 3, 2))


def by_unfolding(module, x):
    """What the other generators stand for, written out with every window in memory."""
    n, c, *size = x.shape
    groups, taps = c // module.group_channels, module.kernel_size**2
    stride, dilation = module.stride, module.dilation
    padding = dilation * (module.kernel_size - 1) // 2
    out = [(side - 1) // stride + 1 for side in size]

    def windows(features):
        columns = F.unfold(features, module.kernel_size, dilation, padding, stride)
        return columns.view(n, -1, module.group_channels, taps, *out)

    pooled = F.avg_pool2d(x, stride, stride, 0, ceil_mode=True, count_include_pad=False)
    if module.generator == 'linear':
        kernels, values = module.conv2.conv(pooled).view(n, groups, taps, *out), x
    else:
        queries = module.query(pooled).view(n, groups, -1, 1, *out)
        places = module.position.weight.view(groups, taps, -1, 1, 1).transpose(1, 2)
        products = queries * (windows(module.key(x)) + places)
        kernels = products.sum(2) / module.group_channels**0.5
        values = module.value(x)
    if module.generator == 'attention':
        padded = windows(torch.ones_like(x))[:, :, 0] == 0
        kernels = kernels.masked_fill(padded, -torch.inf).softmax(2)
    return (kernels.unsqueeze(2) * windows(values)).sum(3).view(n, c, *out)


@backend_name
@pytest.mark.parametrize('generator', OTHERS)
@pytest.mark.parametrize('kernel_size', [1, 3, 7])
@pytest.mark.parametrize('stride, dilation', [(1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize('size', [(1, 1), (2, 3), (9, 8)])
def test_generators_are_what_they_stand_for(
    backend, generator, kernel_size, stride, dilation, size
):
    module = Involution2d(
        *(6, kernel_size, stride, dilation),
        group_channels=3,
        backend=backend,
        generator=generator,
    ).double()
    x = torch.randn(2, 6, *size, dtype=torch.double, requires_grad=True)
    ours, expected = module(x), by_unfolding(module, x)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    tensors = [x, *module.parameters()]
    grad = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, tensors, grad),
        torch.autograd.grad(expected, tensors, grad),
        rtol=1e-12,
        atol=1e-12,
    )


# Along random directions, and of every element.
@pytest.mark.parametrize('fast', [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize('generator', OTHERS)
def test_gradients_of_gradients(generator, fast):
    module = Involution2d(
        *(4, 3, 2), group_channels=2, fused=False, generator=generator
    ).double()
    names, parameters = zip(*module.named_parameters(), strict=True)

    def call(x, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, state, x)

    x = torch.randn(1, 4, 3, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=fast)
    assert torch.autograd.gradgradcheck(call, (x, *parameters), fast_mode=fast)


@pytest.mark.parametrize('stride, dilation', [(1, 1), (2, 1), (1, 3)])
def test_attention_does_not_fade_at_the_border(stride, dilation):
    """Its weights sum to one within the image, so equal values stay what they are."""
    module = Involution2d(8, 5, stride, dilation, 4, generator='attention').double()
    pixel = torch.randn(1, 8, 1, 1, dtype=torch.double)
    out = module(pixel.expand(1, 8, 7, 6))
    torch.testing.assert_close(out, module.value(pixel).expand_as(out))


@pytest.mark.parametrize('generator', ['bottleneck', 'linear'])
@pytest.mark.parametrize('stride', [1, 2])
def test_fused_equals_two_steps(generator, stride, monkeypatch):
    calls = []

    def spy(*arguments, **options):
        calls.append(arguments)
        return fused(*arguments, **options)

    fused = fused_form.fused_involution2d
    monkeypatch.setattr(fused_form, 'fused_involution2d', spy)
    module = Involution2d(16, stride=stride, generator=generator).double()
    x = torch.randn(2, 16, 9, 7, dtype=torch.double, requires_grad=True)
    tensors, results = [x, *module.parameters()], []
    for module.fused in (False, True):
        out = module(x)
        grads = torch.autograd.grad(out.square().sum(), tensors)
        results.append([out, *grads])
    assert len(calls) == 1
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


HOOKS = {
    'forward': nn.Module.register_forward_hook,
    'forward_pre': nn.Module.register_forward_pre_hook,
    'full_backward': nn.Module.register_full_backward_hook,
    'full_backward_pre': nn.Module.register_full_backward_pre_hook,
    'global_forward': lambda _, hook: module_hooks.register_module_forward_hook(hook),
    'global_forward_pre': (
        lambda _, hook: module_hooks.register_module_forward_pre_hook(hook)
    ),
    'global_backward': (
        lambda _, hook: module_hooks.register_module_full_backward_hook(hook)
    ),
    'global_backward_pre': (
        lambda _, hook: module_hooks.register_module_full_backward_pre_hook(hook)
    ),
}


@pytest.mark.parametrize('kind', HOOKS)
@pytest.mark.parametrize('name', ['conv2', 'conv2.conv'])
def test_hooks_on_the_span_are_called(name, kind):
    module = Involution2d(16, stride=2).double()
    watched, seen = module.get_submodule(name), []

    def hook(called, *tensors):
        if called is watched:
            seen.append([t for item in tensors for t in item if t is not None])

    x = torch.randn(2, 16, 9, 7, dtype=torch.double, requires_grad=True)
    handle = HOOKS[kind](watched, hook)
    try:
        for module.fused in (False, None, True):
            module(x).square().sum().backward()
    finally:
        handle.remove()
    assert len(seen) == 3
    for others in seen[1:]:
        torch.testing.assert_close(others, seen[0])


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def call_another(conv):
    """As what fetches weights to the GPU when they are needed does it."""
    conv.forward = lambda x: F.conv2d(x, 2 * conv.weight, conv.bias)


WEIGHT_MASK = torch.arange(49 * 4).view(49, 4, 1, 1) % 3 > 0
BIAS_MASK = torch.arange(49) % 3 > 0
# name -> what is done to the span convolution, its weight and bias by that
CHANGES = {
    'parametrization': (
        lambda conv: parametrize.register_parametrization(conv, 'weight', Doubled()),
        lambda weight, bias: (2 * weight, bias),
    ),
    'spectral_norm': (parametrizations.spectral_norm, lambda w, b: (w / 8, b)),
    'old_spectral_norm': (nn.utils.spectral_norm, lambda w, b: (w / 8, b)),
    'pruned_weight': (
        lambda conv: prune.custom_from_mask(conv, 'weight', WEIGHT_MASK),
        lambda weight, bias: (weight * WEIGHT_MASK, bias),
    ),
    'pruned_bias': (
        lambda conv: prune.custom_from_mask(conv, 'bias', BIAS_MASK),
        lambda weight, bias: (weight, bias * BIAS_MASK),
    ),
    'other_forward': (call_another, lambda weight, bias: (2 * weight, bias)),
}


@pytest.mark.parametrize('change, effect', CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize('fused', [False, None, True])
def test_changes_of_the_span_have_their_effect(change, effect, fused):
    module = Involution2d(16, fused=fused).double()
    span = module.conv2.conv
    nn.init.orthogonal_(span.weight)  # singular values of 8, 4, 2 and 1
    span.weight.data *= 2.0 ** torch.arange(4).view(4, 1, 1)
    nn.init.normal_(span.bias)
    weight, bias = span.weight.detach().clone(), span.bias.detach().clone()
    change(span)
    x = torch.randn(2, 16, 9, 7, dtype=torch.double)
    for _ in range(20):  # the spectral norms come nearer with every call
        out = module(x)
    kernels = F.conv2d(module.conv1(x), *effect(weight, bias)).unflatten(1, (1, 7, 7))
    torch.testing.assert_close(out, involution2d(x, kernels, 1, 3), rtol=1e-8, atol=0)
    out.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in span.parameters())


@pytest.mark.parametrize('fused', [False, None, True])
def test_other_layers_span_the_kernels(fused):
    module = Involution2d(16, fused=fused)
    x = torch.randn(2, 16, 9, 7)
    for other in (
        nn.Conv2d(4, 49, 3, padding=1),
        nn.Conv2d(4, 49, 1, groups=1, bias=False, padding_mode='reflect'),
        nn.Sequential(nn.Conv2d(4, 49, 1), nn.Tanh()),
    ):
        for module.conv2 in (nn.Sequential(other), nn.Sequential(nn.Identity(), other)):
            kernels = other(module.conv1(x)).unflatten(1, (1, 7, 7))
            torch.testing.assert_close(module(x), involution2d(x, kernels, 1, 3))


def test_quantization_observes_the_span():
    quantization = pytest.importorskip('torch.ao.quantization')  # to leave torch
    module = Involution2d(16, fused=True)
    module.conv2.qconfig = quantization.default_qconfig
    quantization.prepare(module, inplace=True)
    x = torch.randn(2, 16, 9, 7)
    module(x)
    highest = F.conv2d(module.conv1(x), *module.conv2.conv.parameters()).max()
    observer = module.conv2.conv.activation_post_process
    torch.testing.assert_close(observer.max_val, highest)


@pytest.mark.parametrize('generator', ['bottleneck', 'linear'])
def test_kernels_are_contiguous_where_triton_reads_them(generator, monkeypatch):
    """In a channels_last network too; the meta device stands for a GPU."""
    weights = []

    def spy(x, weight, **options):
        weights.append(weight)
        return x

    monkeypatch.setattr(fused_form, 'involution2d', spy)
    module = Involution2d(32, 3, generator=generator, fused=False)
    x = torch.rand(2, 32, 5, 6).contiguous(memory_format=torch.channels_last)
    module(x)
    assert not weights[0].is_contiguous()  # what the C++ kernels read as it lies
    module.to('meta')(x.to('meta'))
    assert weights[1].shape == weights[0].shape
    assert weights[1].is_contiguous()


@pytest.mark.parametrize('bias', [False, True])
def test_generated_kernels_are_those_of_the_convolution(bias):
    reduced = torch.rand(2, 8, 5, 6, dtype=torch.double)
    reduced = reduced.contiguous(memory_format=torch.channels_last)
    conv = nn.Conv2d(8, 18, 1, bias=bias).double()
    ours = generate(reduced, conv.weight, conv.bias).unflatten(2, (5, 6))
    torch.testing.assert_close(ours, conv(reduced))


@pytest.mark.parametrize('stride', [1, 2])
@every_generator
def test_flops_are_those_of_the_formula(generator, stride):
    c, k, (h, w) = 32, 5, (8, 6)
    module = Involution2d(c, k, stride, generator=generator)
    with FlopCounterMode(display=False) as counter:
        module(torch.randn(1, c, h, w))
    pixels, outputs = h * w, h * w // stride**2
    span = k**2 * c // 16
    if generator in ('bottleneck', 'linear'):
        reduced = c // 4 if generator == 'bottleneck' else 0
        generate = outputs * (c * reduced + (reduced or c) * span)
    else:
        projections = (2 * pixels + outputs) * c**2
        generate = projections + outputs * 2 * k**2 * c  # keys and positions
    assert counter.get_total_flops() == 2 * (generate + outputs * k**2 * c)


@every_generator
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_traces_of_torchscript(generator):
    module = Involution2d(32, 3, stride=2, generator=generator).eval()
    x = torch.randn(2, 32, 9, 8)
    torch.testing.assert_close(torch.jit.trace(module, x)(x), module(x))


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


@pytest.mark.parametrize(
    'generator, expected',
    [
        ('linear', {'conv2.conv.weight': (98, 32, 1, 1), 'conv2.conv.bias': (98,)}),
        *(
            (
                generator,
                {
                    'query.weight': (32, 32, 1, 1),
                    'key.weight': (32, 32, 1, 1),
                    'value.weight': (32, 32, 1, 1),
                    'position.weight': (98, 16, 1, 1),
                },
            )
            for generator in ('dot_product', 'attention')
        ),
    ],
)
def test_state_dict_of_other_generators(generator, expected):
    state = Involution2d(32, generator=generator).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == expected


@every_generator
def test_initialization_reaches_every_convolution(generator):
    torch.manual_seed(0)
    module = Involution2d(256, generator=generator)
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    for conv in convs:
        deviation = (2 / conv.out_channels) ** 0.5
        assert conv.weight.std().item() == pytest.approx(deviation, rel=0.05)
        assert conv.bias is None or not conv.bias.any()
        nn.init.constant_(conv.weight, 7)
    module.reset_parameters()
    assert not any((conv.weight == 7).any() for conv in convs)


@pytest.mark.parametrize('generator', ['bottleneck', 'linear'])
@pytest.mark.parametrize('stride, dilation', [(1, 1), (1, 2), (2, 1), (3, 1)])
@pytest.mark.parametrize('fused', [False, True])
def test_identity_returns_its_input(generator, stride, dilation, fused):
    module = Involution2d(
        32,
        5,
        stride,
        dilation,
        generator=generator,
        init='identity',
        fused=fused,
    )
    x = torch.randn(2, 32, 9, 7)
    torch.testing.assert_close(module(x), x[..., ::stride, ::stride], rtol=0, atol=0)
    # It is not stuck there: the first step moves the kernels.
    module(x).square().mean().backward()
    assert module.conv2.conv.weight.grad.abs().max() > 0


def test_only_a_bottleneck_reduces_channels():
    assert Involution2d(2, group_channels=2, generator='linear').channels == 2


def test_norm_and_activation_are_exchangeable():
    module = Involution2d(
        16, norm_layer=lambda features: nn.GroupNorm(2, features), act_layer=nn.SiLU
    )
    assert isinstance(module.conv1.bn, nn.GroupNorm)
    assert isinstance(module.conv1.activate, nn.SiLU)
    module(torch.randn(1, 16, 1, 1)).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@every_generator
def test_channels_last_stays_channels_last(generator):
    module = Involution2d(32, generator=generator).to(memory_format=torch.channels_last)
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
        (
            {'channels': 16, 'generator': 'conv'},
            "generator must be one of .*'linear', 'dot_product', .*, got 'conv'",
        ),
        (
            {'channels': 16, 'generator': dict(type='linear')},
            "generator must be one of .*, got {'type': 'linear'}",
        ),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Involution2d(**arguments)


@pytest.mark.parametrize('method', ['forward', 'kernels'])
@pytest.mark.parametrize('stride', [1, 2])
@every_generator
@pytest.mark.parametrize(
    'shape', [(16,), (16, 9, 7), (1, 16, 9, 7, 5), (1, 32, 9, 7), (1, 16, 0, 7)]
)
def test_wrong_inputs_are_refused(shape, generator, stride, method):
    module = Involution2d(16, stride=stride, generator=generator)
    message = 'input must be at least 1x1 in size, got 0x7'
    if 0 not in shape:
        message = r'input must be \[N, 16, H, W\], got shape ' + re.escape(str(shape))
    with pytest.raises(ValueError, match=message):
        getattr(module, method)(torch.rand(shape))


def test_repr_shows_the_arguments():
    text = repr(Involution2d(32, kernel_size=5, stride=2, generator='linear'))
    assert (
        'Involution2d(\n  32, kernel_size=5, stride=2, dilation=1, group_channels=16, '
        "reduction_ratio=4, generator='linear', init='official'\n"
    ) in text


def test_ops_need_torch_alone():
    """Whatever else is installed, the operator does not touch it."""
    code = (
        'import sys, torch; from mmcls_involution.ops import Involution2d; '
        'print(tuple(Involution2d(16, stride=2)(torch.ones(1, 16, 5, 7)).shape)); '
        'print([m for m in sys.modules if m.split(".")[0] in '
        '("mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain", "cv2", "torchvision")])'
    )
    out = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    assert out.stdout.splitlines() == ['(1, 16, 3, 4)', '[]']
