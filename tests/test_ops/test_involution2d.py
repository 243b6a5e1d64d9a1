"""involution2d against a plain loop and the unfold reference, in float64."""

import itertools

import pytest
import torch
from op_cases import (
    CASES,
    DTYPES,
    assert_error_is_at_most_twice,
    backend_name,
    case,
    case_not_empty,
    oracle,
    pair,
)
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from mmcls_involution.ops import fused_involution2d, involution2d, output_size
from mmcls_involution.ops.backends import reference


def make(shape, groups, kernel, stride, padding, dilation, dtype=torch.float64):
    size = output_size(shape[2:], kernel, pair(stride), pair(padding), pair(dilation))
    input = torch.randn(shape, dtype=dtype, requires_grad=True)
    weight = torch.randn(
        shape[0], groups, *kernel, *size, dtype=dtype, requires_grad=True
    )
    return input, weight, (stride, padding, dilation)


def loop(input, weight, stride, padding, dilation):
    """The definition, one multiplication at a time."""
    stride, padding, dilation = pair(stride), pair(padding), pair(dilation)
    n, c, height, width = input.shape
    g, kh, kw, ho, wo = weight.shape[1:]
    out = input.new_zeros(n, c, ho, wo)
    for ch, u, v, i, j in itertools.product(
        range(c), range(kh), range(kw), range(ho), range(wo)
    ):
        y = i * stride[0] + u * dilation[0] - padding[0]
        x = j * stride[1] + v * dilation[1] - padding[1]
        if 0 <= y < height and 0 <= x < width:
            out[:, ch, i, j] += (
                weight[:, ch // (c // g), u, v, i, j] * input[:, ch, y, x]
            )
    return out


@case
def test_reference_is_the_definition(shape, groups, kernel, stride, padding, dilation):
    with torch.no_grad():
        input, weight, arguments = make(
            shape, groups, kernel, stride, padding, dilation
        )
        expected = loop(input, weight, *arguments)
        torch.testing.assert_close(oracle(input, weight, *arguments), expected)


@backend_name
@case
def test_float64_is_exact(backend, shape, groups, kernel, stride, padding, dilation):
    input, weight, arguments = make(shape, groups, kernel, stride, padding, dilation)
    out = involution2d(input, weight, *arguments, backend=backend)
    expected = oracle(input, weight, *arguments)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, (input, weight), grad),
        torch.autograd.grad(expected, (input, weight), grad),
        rtol=1e-12,
        atol=1e-12,
    )


@backend_name
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@case
def test_error_is_at_most_twice_that_of_pytorch(
    backend, dtype, shape, groups, kernel, stride, padding, dilation
):
    """Root mean square, of output and gradients, beside the oracle's in this dtype."""
    problem = (shape, groups, kernel, stride, padding, dilation, dtype)
    *_, arguments = make(*problem)

    assert_error_is_at_most_twice(
        lambda *t: involution2d(*t, *arguments, backend=backend),
        lambda *t: oracle(*t, *arguments),
        lambda: make(*problem)[:2],
    )


@backend_name
@case_not_empty
def test_gradcheck(backend, shape, groups, kernel, stride, padding, dilation):
    # gradcheck differentiates every element; two channels of each group say it all.
    shape = (1, 2 * groups, *shape[2:])
    input, weight, arguments = make(shape, groups, kernel, stride, padding, dilation)

    def function(input, weight):
        return involution2d(input, weight, *arguments, backend=backend)

    assert torch.autograd.gradcheck(function, (input, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (input, weight), fast_mode=True)


def test_gradcheck_of_every_element():
    input, weight, arguments = make((1, 4, 4, 5), 2, (3, 3), 2, 1, 1)

    def function(input, weight):
        return involution2d(input, weight, *arguments)

    assert torch.autograd.gradcheck(function, (input, weight))
    assert torch.autograd.gradgradcheck(function, (input, weight))


@pytest.mark.parametrize('frozen', ['input', 'weight'])
def test_gradient_of_one_argument_alone(frozen):
    input, weight, arguments = make((2, 4, 6, 5), 2, (3, 3), 1, 1, 1)
    kept = weight if frozen == 'input' else input
    expected = torch.autograd.grad(oracle(input, weight, *arguments).sum(), kept)[0]
    (input if frozen == 'input' else weight).requires_grad_(False)
    involution2d(input, weight, *arguments).sum().backward()
    torch.testing.assert_close(kept.grad, expected)
    assert (input if frozen == 'input' else weight).grad is None


@backend_name
@pytest.mark.parametrize('layout', ['channels_last', 'transposed', 'expanded'])
def test_any_strides(backend, layout):
    input, weight, arguments = make((2, 8, 7, 6), 2, (3, 3), 2, 1, 1)
    if layout == 'channels_last':
        input = input.contiguous(memory_format=torch.channels_last)
        weight = weight.flatten(1, 3).contiguous(memory_format=torch.channels_last)
        weight = weight.unflatten(1, (2, 3, 3))
    elif layout == 'transposed':
        input = input.transpose(2, 3).contiguous().transpose(2, 3)
        weight = weight.transpose(0, 5).contiguous().transpose(0, 5)
    else:
        input = input[:1].expand(2, -1, -1, -1)
    expected = oracle(input, weight, *arguments)
    out = involution2d(input, weight, *arguments, backend=backend)
    torch.testing.assert_close(out, expected)
    is_last = out.is_contiguous(memory_format=torch.channels_last)
    assert is_last == (layout == 'channels_last')
    # sum() sends back an expanded gradient.
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), (input, weight)),
        torch.autograd.grad(expected.sum(), (input, weight)),
    )


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('mixed', [False, True])
def test_autocast_runs_in_the_chosen_dtype(dtype, mixed):
    input, weight, arguments = make((2, 4, 6, 5), 2, (3, 3), 1, 1, 1, torch.float32)
    low = weight.detach().to(dtype).requires_grad_() if mixed else weight
    with torch.autocast('cpu', dtype=dtype):
        out = involution2d(input, low, *arguments)
    assert out.dtype == dtype
    out.sum().backward()
    assert input.grad.dtype == torch.float32
    assert low.grad.dtype == low.dtype
    torch.testing.assert_close(
        out, involution2d(input.to(dtype), weight.to(dtype), *arguments)
    )


@pytest.mark.parametrize('device', ['cpu', 'cuda', 'mps', 'xpu'])
@pytest.mark.parametrize('fused', [False, True])
def test_autocast_of_every_device(device, fused):
    """By its key in torch's dispatcher, for there is no such device here."""
    x, weight = torch.randn(1, 4, 6, 5), torch.randn(18, 3, 1, 1)
    reduced, kernels = torch.randn(1, 3, 6, 5), torch.randn(1, 2, 3, 3, 6, 5)
    key = getattr(torch._C.DispatchKey, f'Autocast{device.upper()}')
    torch.set_autocast_enabled(device, True)  # torch.autocast wants the device
    try:
        with torch._C._IncludeDispatchKeyGuard(key):
            if fused:
                out = fused_involution2d(x, reduced, weight, kernel_size=3, padding=1)
            else:
                out = involution2d(x, kernels, padding=1)
    finally:
        torch.set_autocast_enabled(device, False)
    assert out.dtype == torch.get_autocast_dtype(device) != torch.float32


@backend_name
@pytest.mark.parametrize('name', ['stride 2, odd', 'unequal sides', 'empty batch'])
def test_opcheck(backend, name):
    shape, groups, kernel, stride, padding, dilation = CASES[name]
    input, weight, arguments = make(shape, groups, kernel, stride, padding, dilation)
    grad = torch.randn_like(oracle(input, weight, *arguments)).requires_grad_()
    arguments = [list(pair(argument)) for argument in arguments]
    ops = torch.ops.mmcls_involution
    opcheck(ops.involution2d.default, (input, weight, *arguments, backend))
    size, kernels = list(shape[2:]), list(weight.shape)
    opcheck(
        ops.involution2d_grad_input.default,
        (grad, weight, size, *arguments, backend),
    )
    opcheck(
        ops.involution2d_grad_weight.default,
        (grad, input, kernels, *arguments, backend),
    )


def test_compile_without_graph_breaks_for_changing_sizes():
    def function(input, weight):
        return involution2d(input, weight, 2, 3) * 2

    compiled = torch.compile(
        function, fullgraph=True, dynamic=True, backend='aot_eager'
    )
    for height, width in [(9, 7), (8, 12), (5, 15)]:
        input, weight, _ = make((2, 4, height, width), 2, (7, 7), 2, 3, 1)
        out, expected = compiled(input, weight), function(input, weight)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), (input, weight)),
            torch.autograd.grad(expected.sum(), (input, weight)),
        )


def test_same_result_every_time():
    input, weight, arguments = make((2, 32, 19, 17), 2, (7, 7), 1, 3, 1, torch.float32)
    results = []
    for _ in range(2):
        out = involution2d(input, weight, *arguments)
        results.append([out, *torch.autograd.grad(out.sum(), (input, weight))])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_training_keeps_input_and_weight_alone():
    """What autograd saves: the two tensors themselves, no K*K copy."""
    input, weight, arguments = make((2, 32, 9, 7), 2, (7, 7), 1, 3, 1, torch.float32)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        involution2d(input, weight, *arguments)
    pointers = {tensor.data_ptr() for tensor in saved}
    assert pointers == {input.data_ptr(), weight.data_ptr()}


def test_flops_are_two_per_multiply_add():
    input, weight, arguments = make((2, 6, 7, 9), 3, (3, 5), (2, 2), (1, 2), 1)
    with FlopCounterMode(display=False) as counter:
        out = involution2d(input, weight, *arguments)
    forward = 2 * out.numel() * 3 * 5
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * forward


def test_environment_variable_names_the_backend(monkeypatch):
    input, weight, arguments = make((1, 2, 3, 3), 1, (3, 3), 1, 1, 1)
    monkeypatch.setenv('MMCLS_INVOLUTION_BACKEND', 'no_such_backend')
    with pytest.raises(ValueError, match="one of .*, got 'no_such_backend'"):
        involution2d(input, weight, *arguments)
    involution2d(input, weight, *arguments, backend='tap_sum')
    called = []
    monkeypatch.setenv('MMCLS_INVOLUTION_BACKEND', 'reference')
    monkeypatch.setattr(
        reference, 'forward', lambda input, *_: called.append(1) or input.clone()
    )
    involution2d(input, weight, *arguments)
    assert called


GOOD = torch.zeros(2, 4, 5, 6), torch.zeros(2, 2, 3, 3, 5, 6)


@pytest.mark.parametrize(
    'input, weight, arguments, message',
    [
        (torch.zeros(4, 5, 6), GOOD[1], {}, r'input must be \[N, C, H, W\].*4, 5, 6'),
        (GOOD[0], torch.zeros(2, 18, 5, 6), {}, r'weight must be \[N, G, Kh.*2, 18'),
        (GOOD[0].int(), GOOD[1].int(), {}, 'input must be one of.*int32'),
        (GOOD[0].half(), GOOD[1], {}, 'weight must have the dtype.*float16.*float32'),
        (GOOD[0], GOOD[1].to('meta'), {}, 'on the device of input, cpu, got meta'),
        (GOOD[0][:1], GOOD[1], {}, 'batch size of input, 1, got 2'),
        (GOOD[0][:, :3], GOOD[1], {}, 'must divide.*channels, 3, got 2 groups'),
        (GOOD[0], GOOD[1][:, :0], {}, 'must divide.*channels, 4, got 0 groups'),
        (GOOD[0], GOOD[1][:, :, :0], {}, 'at least 1x1, got 0x3'),
        (GOOD[0][:, :, :0], GOOD[1][..., :0, :], {}, 'at least 1x1 in size, got 0x6'),
        (GOOD[0], GOOD[1][..., :4], {}, '5x6 for input 5x6.*got 5x4'),
        (GOOD[0], GOOD[1], {'stride': 2}, '3x3 for input 5x6.*got 5x6'),
        (GOOD[0], GOOD[1], {'padding': 0, 'dilation': 3}, 'does not fit.*5x6'),
        (GOOD[0], GOOD[1], {'stride': 0}, 'stride must be at least 1, got 0'),
        (GOOD[0], GOOD[1], {'padding': -1}, 'padding must be at least 0, got -1'),
        (
            GOOD[0],
            GOOD[1],
            {'stride': 2**63},
            'stride must be at most 2147483647, got 9',
        ),
        (
            GOOD[0],
            GOOD[1],
            {'padding': (0, 2**31)},
            'padding must be at most 2147483647',
        ),
        (GOOD[0], GOOD[1], {'dilation': (1, 1, 1)}, 'dilation must be an int or a'),
        (GOOD[0], GOOD[1], {'backend': 'cupy'}, "one of .*tap_sum.*, got 'cupy'"),
    ],
)
def test_wrong_values_are_refused(input, weight, arguments, message):
    with pytest.raises(ValueError, match=message):
        involution2d(input, weight, **{'padding': 1, **arguments})


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'input': [1.0]}, 'input must be a Tensor, got list'),
        ({'weight': None}, 'weight must be a Tensor, got NoneType'),
        ({'stride': 1.5}, 'stride must be an int or a pair of ints, got 1.5'),
        ({'padding': '1'}, "padding must be an int or a pair of ints, got '1'"),
        ({'dilation': True}, 'dilation must be an int or a pair of ints, got True'),
    ],
)
def test_wrong_types_are_refused(arguments, message):
    input, weight = GOOD
    with pytest.raises(TypeError, match=message):
        involution2d(**{'input': input, 'weight': weight, 'padding': 1, **arguments})
