"""fused_involution2d against the two steps that it stands for."""

import random

import pytest
import torch
import torch.nn.functional as F
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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from mmcls_involution.ops import (
    BACKENDS,
    Involution2d,
    fused_involution2d,
    involution2d,
    output_size,
)
from mmcls_involution.ops.backends import tiled


def make(
    shape, groups, kernel, stride, padding, dilation, dtype=torch.float64, bias=True
):
    """The four tensors, and the arguments of either form."""
    size = output_size(shape[2:], kernel, pair(stride), pair(padding), pair(dilation))
    rows = groups * kernel[0] * kernel[1]
    shapes = shape, (shape[0], 5, *size), (rows, 5, 1, 1), (rows,)
    tensors = [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]
    if not bias:
        tensors.pop()
    arguments = dict(stride=stride, padding=padding, dilation=dilation)
    return tensors, dict(kernel_size=kernel, **arguments)


def two_steps(input, reduced, weight, bias=None, *, kernel_size, **arguments):
    kernels = F.conv2d(reduced, weight, bias).unflatten(1, (-1, *pair(kernel_size)))
    return oracle(input, kernels, *arguments.values())


def set_tiles(monkeypatch, size):
    monkeypatch.setattr(tiled, 'TILE_BYTES', dict(cpu=size, other=size))


@pytest.mark.parametrize('size', [tiled.TILE_BYTES['cpu'], 4000, 1])
@backend_name
@pytest.mark.parametrize('bias', [True, False])
@case
def test_float64_is_exact(
    size, backend, bias, shape, groups, kernel, stride, padding, dilation, monkeypatch
):
    set_tiles(monkeypatch, size)
    tensors, arguments = make(
        shape, groups, kernel, stride, padding, dilation, bias=bias
    )
    out = fused_involution2d(*tensors, **arguments, backend=backend)
    expected = two_steps(*tensors, **arguments)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, tensors, grad),
        torch.autograd.grad(expected, tensors, grad),
        rtol=1e-12,
        atol=1e-11,
    )


@backend_name
def test_tiles_taller_than_wide(backend, monkeypatch):
    set_tiles(monkeypatch, 4000)  # 13 of 30 rows
    tensors, arguments = make((1, 4, 30, 2), 2, (3, 3), 1, 1, 1)
    out = fused_involution2d(*tensors, **arguments, backend=backend)
    expected = two_steps(*tensors, **arguments)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), tensors),
        torch.autograd.grad(expected.sum(), tensors),
    )


@backend_name
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@case
def test_error_is_at_most_twice_that_of_pytorch(
    backend, dtype, shape, groups, kernel, stride, padding, dilation
):
    problem = (shape, groups, kernel, stride, padding, dilation, dtype)
    _, arguments = make(*problem)

    assert_error_is_at_most_twice(
        lambda *t: fused_involution2d(*t, **arguments, backend=backend),
        lambda *t: two_steps(*t, **arguments),
        lambda: make(*problem)[0],
    )


@backend_name
@case_not_empty
def test_gradcheck(backend, shape, groups, kernel, stride, padding, dilation):
    shape = (1, 2 * groups, *shape[2:])
    tensors, arguments = make(shape, groups, kernel, stride, padding, dilation)

    def function(*tensors):
        return fused_involution2d(*tensors, **arguments, backend=backend)

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize('frozen', range(4))
def test_gradients_of_some_arguments_alone(frozen):
    tensors, arguments = make((2, 4, 6, 5), 2, (3, 3), 1, 1, 1)
    kept = [t for i, t in enumerate(tensors) if i != frozen]
    expected = torch.autograd.grad(two_steps(*tensors, **arguments).sum(), kept)
    tensors[frozen].requires_grad_(False)
    fused_involution2d(*tensors, **arguments).sum().backward()
    assert tensors[frozen].grad is None
    for tensor, grad in zip(kept, expected, strict=True):
        torch.testing.assert_close(tensor.grad, grad)


@backend_name
@pytest.mark.parametrize('reduced_too', [False, True])
def test_channels_last_input_gives_channels_last_output(backend, reduced_too):
    tensors, arguments = make((2, 8, 7, 6), 2, (3, 3), 2, 1, 1)
    expected = two_steps(*tensors, **arguments)
    for i in range(1 + reduced_too):
        tensors[i] = tensors[i].contiguous(memory_format=torch.channels_last)
    out = fused_involution2d(*tensors, **arguments, backend=backend)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('backward_inside', [False, True])
def test_autocast_runs_in_the_chosen_dtype(dtype, backward_inside):
    tensors, arguments = make((2, 4, 6, 5), 2, (3, 3), 1, 1, 1, torch.float32)
    with torch.autocast('cpu', dtype=dtype):
        out = fused_involution2d(*tensors, **arguments)
        if backward_inside:
            out.sum().backward()
    if not backward_inside:
        out.sum().backward()
    assert out.dtype == dtype
    assert all(t.grad.dtype == torch.float32 for t in tensors)
    low = [t.detach().to(dtype) for t in tensors]
    torch.testing.assert_close(out, fused_involution2d(*low, **arguments))


def test_backward_under_autocast_of_a_forward_pass_without():
    tensors, arguments = make((2, 32, 6, 5), 2, (7, 7), 1, 3, 1, torch.float32)
    out = fused_involution2d(*tensors, **arguments)
    expected = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out.sum().backward()
    for tensor, grad in zip(tensors, expected, strict=True):
        assert torch.equal(tensor.grad, grad)


@backend_name
@pytest.mark.parametrize('needed', [(True,) * 4, (True, False, False, True)])
def test_opcheck_of_the_gradients(backend, needed):
    tensors, arguments = make(*CASES['stride 2, odd'])
    tensors = [t.detach() for t in tensors]
    grad = torch.rand_like(fused_involution2d(*tensors, **arguments))
    lists = [list(pair(value)) for value in arguments.values()]
    operator = torch.ops.mmcls_involution.fused_involution2d_backward.default
    opcheck(operator, (grad, *tensors, *lists, backend, list(needed)))


@backend_name
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16], ids=str)
def test_gradients_are_as_their_fakes(backend, dtype):
    """Compiled code relies on it, whatever way the weights lie."""
    tensors, arguments = make(*CASES['stride 2, odd'], dtype)
    input, reduced, weight, bias = (t.detach() for t in tensors)
    tensors = input, reduced, weight.transpose(0, 1).contiguous().transpose(0, 1), bias
    grad = torch.rand_like(fused_involution2d(*tensors, **arguments))
    lists = [list(pair(value)) for value in arguments.values()]
    operator = torch.ops.mmcls_involution.fused_involution2d_backward.default
    found = operator(grad, *tensors, *lists, backend, [True] * 4)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (grad, *tensors)]
        expected = operator(*fakes, *lists, backend, [True] * 4)
    for ours, fake in zip(found, expected, strict=True):
        assert ours.stride() == fake.stride() and ours.dtype == fake.dtype


@backend_name
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('name', ['stride 2, odd', 'unequal sides', 'empty batch'])
def test_opcheck(backend, bias, name):
    tensors, arguments = make(*CASES[name], bias=bias)
    if not bias:
        tensors.append(None)
    lists = [list(pair(value)) for value in arguments.values()]
    operator = torch.ops.mmcls_involution.fused_involution2d.default
    opcheck(operator, (*tensors, *lists, backend))


def test_compile_without_graph_breaks_for_changing_sizes():
    module = Involution2d(32, stride=2, fused=True).double()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend='aot_eager')
    for height, width in [(9, 7), (8, 12), (5, 15)]:
        x = torch.randn(2, 32, height, width, dtype=torch.float64, requires_grad=True)
        parameters = x, *module.parameters()
        torch.testing.assert_close(
            torch.autograd.grad(compiled(x).square().sum(), parameters),
            torch.autograd.grad(module(x).square().sum(), parameters),
        )


@pytest.mark.parametrize('shape', [(1, 32, 40, 30), (9, 32, 12, 10)])
def test_no_more_kernels_than_a_tile_holds(shape, monkeypatch):
    set_tiles(monkeypatch, 1 << 18)
    sizes = []

    generate = tiled.generate

    def record(*arguments):
        result = generate(*arguments)
        sizes.append(result.nbytes)
        return result

    monkeypatch.setattr(tiled, 'generate', record)
    tensors, arguments = make(shape, 2, (7, 7), 1, 3, 1)
    fused_involution2d(*tensors, **arguments, backend='tap_sum').sum().backward()
    assert len(sizes) >= 8
    assert max(sizes) <= 1 << 18


def test_training_keeps_the_four_tensors_alone():
    tensors, arguments = make((2, 32, 9, 7), 2, (7, 7), 1, 3, 1)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused_involution2d(*tensors, **arguments)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in tensors}


def test_flops_are_those_of_the_two_steps():
    tensors, arguments = make((2, 6, 7, 9), 3, (3, 5), (2, 2), (1, 2), 1)
    input, reduced, weight, bias = tensors
    with FlopCounterMode(display=False) as counter:
        fused_involution2d(*tensors, **arguments)
    fused = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        kernels = F.conv2d(reduced, weight, bias).unflatten(1, (3, 3, 5))
        involution2d(input, kernels, (2, 2), (1, 2), 1)
    assert fused == counter.get_total_flops()


@pytest.mark.parametrize(
    'argument, value, message',
    [
        ('input', torch.zeros(4, 5, 6), r'input must be \[N, C, H, W\]'),
        ('reduced', torch.zeros(2, 3, 5), r'reduced must be \[N, R, Ho, Wo\]'),
        (
            'reduced',
            torch.zeros(2, 4, 5, 6),
            r'R = 4, the channels of.*\(18, 3, 1, 1\)',
        ),
        ('reduced', torch.zeros(1, 3, 5, 6), 'reduced must have the batch size.*2.*1'),
        ('reduced', torch.zeros(2, 3, 5, 5), 'reduced must hold one kernel per.*5x5'),
        ('reduced', torch.zeros(2, 3, 5, 6).half(), 'reduced must have the dtype'),
        ('weight', torch.zeros(18, 3), r'weight must be \[G\*Kh\*Kw, R, 1, 1\]'),
        ('weight', torch.zeros(17, 3, 1, 1), 'Kh.Kw = 9.*17'),
        ('weight', torch.zeros(27, 3, 1, 1), "divide input's channels, 4, got 3"),
        ('bias', torch.zeros(9), 'one value per row of weight, 18, got'),
        ('bias', torch.zeros(18, device='meta'), 'on the device of input, cpu, got'),
        ('kernel_size', 0, 'kernel_size must be at least 1, got 0'),
        ('backend', 'cupy', "one of .*tap_sum.*, got 'cupy'"),
    ],
)
def test_wrong_values_are_refused(argument, value, message):
    arguments = dict(
        input=torch.zeros(2, 4, 5, 6),
        reduced=torch.zeros(2, 3, 5, 6),
        weight=torch.zeros(18, 3, 1, 1),
        bias=torch.zeros(18),
        kernel_size=3,
        padding=1,
    )
    arguments[argument] = value
    if argument == 'weight' and len(value) == 27:
        arguments['bias'] = torch.zeros(27)
    with pytest.raises(ValueError, match=message):
        fused_involution2d(**arguments)


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match='reduced must be a Tensor, got float'):
        fused_involution2d(torch.zeros(1, 2, 3, 3), 1.0, None, kernel_size=3)


def random_module(rng, **arguments):
    group_channels, reduction_ratio = rng.choice([1, 3, 8, 16]), rng.choice([1, 2, 4])
    return Involution2d(
        group_channels * rng.randint(1, 3) * 4,
        kernel_size=rng.choice([1, 3, 5, 7]),
        stride=rng.randint(1, 3),
        dilation=rng.randint(1, 2),
        group_channels=group_channels,
        reduction_ratio=reduction_ratio,
        **arguments,
    )


@backend_name
@pytest.mark.parametrize('seed', range(20))
def test_random_modules_give_the_same_in_both_forms(backend, seed, monkeypatch):
    rng = random.Random(seed)
    set_tiles(monkeypatch, rng.choice([1 << 20, 1 << 14, 1]))
    module = random_module(rng, backend=backend).double()
    size = rng.randint(1, 40), rng.randint(1, 40)
    x = torch.randn(2, module.channels, *size, dtype=torch.float64, requires_grad=True)
    if rng.random() < 0.5:
        x = x.contiguous(memory_format=torch.channels_last)
    results = []
    for module.fused in (True, False):
        out = module(x)
        grads = torch.autograd.grad(out.square().sum(), (x, *module.parameters()))
        results.append([out, *grads])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def names_of_operators(module):
    """Of those that one forward pass runs."""
    with torch.profiler.profile() as profile, torch.no_grad():
        module(torch.rand(1, module.channels, 5, 5))
    return {event.name for event in profile.events()}


FUSED = 'mmcls_involution::fused_involution2d'


def test_form_is_chosen_by_argument_then_variable_then_table(monkeypatch):
    backend = 'tap_sum'
    assert not BACKENDS[backend].fused
    module = Involution2d(16, 3, backend=backend)
    assert FUSED not in names_of_operators(module)
    monkeypatch.setenv('MMCLS_INVOLUTION_FUSED', '1')
    assert FUSED in names_of_operators(module)
    module.fused = False
    assert FUSED not in names_of_operators(module)
    module.fused = True
    monkeypatch.setenv('MMCLS_INVOLUTION_FUSED', '0')
    assert FUSED in names_of_operators(module)
    module.fused = None
    monkeypatch.setenv('MMCLS_INVOLUTION_FUSED', 'yes')
    with pytest.raises(ValueError, match="FUSED must be 0 or 1, got 'yes'"):
        module(torch.rand(1, 16, 5, 5))


@pytest.mark.parametrize('outer', [False, True])
@pytest.mark.parametrize('change', ['replaced', 'hooked before', 'hooked behind'])
def test_changed_span_convolution_is_called(change, outer):
    """The convolution, or the sequence that it is in."""
    module = Involution2d(16, 3, fused=True)
    span = module.conv2 if outer else module.conv2.conv
    calls = []

    def count(*_):
        calls.append(1)

    if change == 'hooked before':
        span.register_forward_pre_hook(count)
    elif change == 'hooked behind':
        span.register_forward_hook(count)
    else:

        class Counting(type(span)):
            def forward(self, x):
                count()
                return super().forward(x)

        span.__class__ = Counting  # as torch's fully_shard does it
    module(torch.rand(1, 16, 5, 5))
    assert calls


@pytest.mark.parametrize('generator', ['bottleneck', 'linear'])
def test_gradients_of_the_fused_form_that_are_differentiated_in_turn(generator):
    """The kernels are made of the input: its two paths are counted once each."""
    module = Involution2d(
        *(4, 3, 2), group_channels=2, fused=True, generator=generator
    ).double()
    module.eval()
    tensors = [
        torch.randn(2, 4, 5, 7, dtype=torch.double, requires_grad=True),
        *module.parameters(),
    ]
    out = module(tensors[0])
    grad = torch.randn_like(out)
    arguments = dict(grad_outputs=grad, create_graph=True)
    once = torch.autograd.grad(out, tensors, grad, retain_graph=True)
    again = torch.autograd.grad(out, tensors, **arguments)
    torch.testing.assert_close(again, once, rtol=1e-12, atol=1e-12)
    # And in turn, against the two steps.
    module.fused = False
    directions = [torch.randn_like(t) for t in tensors]
    expected = torch.autograd.grad(module(tensors[0]), tensors, **arguments)
    found, expected = (
        torch.autograd.grad(first, tensors, directions, allow_unused=True)
        for first in (again, expected)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_gradients_in_turn_need_no_memory():
    """On the meta device, which has no autocast."""
    module = Involution2d(16, 3, fused=True, backend='tap_sum').to('meta')
    x = torch.empty(1, 16, 5, 7, device='meta', requires_grad=True)
    (grad,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    assert grad.shape == x.shape
