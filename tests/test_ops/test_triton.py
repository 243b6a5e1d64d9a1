"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter.

The interpreter is slow, so its problems are small, and some of them are long;
test_involution2d and the others run the operators with this backend where there is a
GPU. test_triton_setup.py has what comes before a result: whether they can run at all.
"""

import random

import pytest
import torch
from op_cases import (
    CASES,
    DTYPES,
    TRITON_KERNELS,
    WITH_TRITON,
    exact,
    exact_and_scale,
    pair,
)

from mmcls_involution.ops import involution2d, output_size
from mmcls_involution.ops.backends import default_backend, reference
from mmcls_involution.ops.backends import triton_kernels as triton
from mmcls_involution.ops.backends.contract import Problem

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
pytest.importorskip(**WITH_TRITON)
on_gpu = pytest.mark.skipif(
    triton.supports(Problem.typical('cuda', torch.float32)) is not None,
    reason='needs an NVIDIA GPU',
)
LAYOUTS = {'nchw': torch.contiguous_format, 'channels_last': torch.channels_last}
layout = pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
long_in_interpreter = pytest.mark.long if DEVICE == 'cpu' else ()
NAMES = ('forward', 'grad_input', 'grad_weight')


def problem(shape, groups, kernel, stride, padding, dilation, dtype, layout):
    """Arguments of the three functions, in the order of NAMES."""
    arguments = pair(stride), pair(padding), pair(dilation)
    size = output_size(shape[2:], kernel, *arguments)

    def pixels(*shape):
        tensor = torch.randn(shape, device=DEVICE).to(dtype)
        return tensor.contiguous(memory_format=layout)

    x, grad = pixels(*shape), pixels(*shape[:2], *size)
    weight = torch.randn(shape[0], groups, *kernel, *size, device=DEVICE).to(dtype)
    return (
        (x, weight, *arguments),
        (grad, weight, shape[2:], *arguments),
        (grad, x, weight.shape, *arguments),
    )


def assert_close(name, arguments):
    """Within four units in the last place of what is summed, or one rounding."""
    ours = getattr(triton, name)(*arguments)
    right, scale = exact_and_scale(name, arguments)
    assert ours.dtype == arguments[0].dtype
    assert ours.shape == right.shape
    if ours.numel():
        ulps = 4 if ours.dtype in (torch.float32, torch.float64) else 0.51
        if ours.dtype == torch.bfloat16 and DEVICE == 'cpu':
            ulps = 1.01  # the interpreter cuts bfloat16 off where GPUs round
        bound = ulps * torch.finfo(ours.dtype).eps * scale
        assert ((ours.double() - right).abs() <= bound).all(), (name, arguments[2:])


@pytest.fixture
def kernels():
    from mmcls_involution.ops.backends.triton_kernels import kernels

    return kernels


@pytest.fixture
def candidates(kernels, monkeypatch):
    """The tuner's, as a list that a test may set."""

    def choose(configs):
        for name in TRITON_KERNELS:
            monkeypatch.setattr(getattr(kernels, name), 'configs', configs)
            getattr(kernels, name).cache.clear()

    yield choose
    for name in TRITON_KERNELS:
        getattr(kernels, name).cache.clear()


@pytest.mark.parametrize(
    'layout, shape, groups, kernel, stride, padding, dilation',
    [
        pytest.param(
            *(LAYOUTS[layout], *CASES[name]),
            id=f'{name}-{layout}',
            marks=() if (i + j) % 2 == 0 else long_in_interpreter,
        )
        for i, name in enumerate(CASES)
        for j, layout in enumerate(LAYOUTS)
    ],
)
def test_float64_is_exact(layout, shape, groups, kernel, stride, padding, dilation):
    """Against the unfold reference and PyTorch's gradients of it.

    In the interpreter the cases take turns in their memory format.
    """
    forward, grad_input, grad_weight = problem(
        *(shape, groups, kernel, stride, padding, dilation), torch.float64, layout
    )
    x, weight, *arguments = forward
    wanted = [t.detach().requires_grad_() for t in (x, weight)]
    out = reference.forward(*wanted, *arguments)
    gradients = torch.autograd.grad(out, wanted, grad_input[0])
    for name, call, right in zip(
        NAMES, (forward, grad_input, grad_weight), (out, *gradients), strict=True
    ):
        ours = getattr(triton, name)(*call)
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)
        if name != 'grad_weight' and ours.numel():
            assert ours.is_contiguous(memory_format=layout)


@pytest.mark.parametrize('rows, lanes', [(1, 32), (2, 32)])
@pytest.mark.parametrize('name', ['stride 2, even', 'unequal strides', 'one row'])
def test_every_block_gives_the_same(candidates, kernels, rows, lanes, name):
    cases = {**CASES, 'unequal strides': ((1, 4, 11, 10), 2, (3, 2), (3, 2), (2, 1), 1)}
    blocks = dict(ROWS=rows, BLOCK_P=lanes)
    candidates([c for c in kernels.CONFIGS if c.kwargs == blocks])
    assert kernels.forward.configs
    for function, arguments in zip(
        NAMES, problem(*cases[name], torch.float64, torch.channels_last), strict=True
    ):
        torch.testing.assert_close(
            getattr(triton, function)(*arguments), exact(function, arguments)
        )


def test_the_tests_know_every_block(kernels):
    known = {(1, 32), (2, 32), (4, 32)}  # (4, 32) is the default
    assert {(c.kwargs['ROWS'], c.kwargs['BLOCK_P']) for c in kernels.CONFIGS} == known


@layout
@pytest.mark.parametrize('channels', [1, 12, 40])
def test_groups_that_fill_no_block(channels, layout):
    """Fewer channels than a block, a part of one, and two and a half blocks."""
    shape = (1, 2 * channels, 5, 6)
    for name, arguments in zip(
        NAMES, problem(shape, 2, (3, 3), 1, 1, 1, torch.float64, layout), strict=True
    ):
        assert_close(name, arguments)


@pytest.mark.parametrize('number', [1, pytest.param(10, marks=long_in_interpreter)])
@pytest.mark.parametrize(
    'dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_random_problems(dtype, number):
    """Fresh ones every time."""

    def both(low, high):
        return random.randint(low, high), random.randint(low, high)

    done = 0
    while done < number:
        kernel, stride, padding, dilation = (
            both(1, 4),
            both(1, 3),
            both(0, 4),
            both(1, 3),
        )
        size = both(1, 12) if DEVICE == 'cpu' else both(1, 90)
        if min(output_size(size, kernel, stride, padding, dilation)) < 1:
            continue
        groups, layout = random.randint(1, 3), random.choice([*LAYOUTS.values()])
        shape = (random.randint(1, 2), groups * random.randint(1, 34), *size)
        calls = problem(
            *(shape, groups, kernel, stride, padding, dilation), dtype, layout
        )
        for name, arguments in zip(NAMES, calls, strict=True):
            try:
                assert_close(name, arguments)
            except AssertionError as error:
                raise AssertionError(f'{shape}, {groups} groups') from error
        done += 1


@pytest.fixture
def dots_of_bfloat16(monkeypatch):
    """The interpreter multiplies the bits of bfloat16 as integers."""
    from triton import language
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    multiply = Builder.create_dot

    def widen_and_multiply(self, *operands_and_rest):
        operands, rest = operands_and_rest[:2], operands_and_rest[2:]
        if operands[0].dtype.scalar == language.bfloat16:
            operands = [
                self.cast_impl(
                    o, language.block_type(language.float32, [*o.data.shape])
                )
                for o in operands
            ]
        return multiply(self, *operands, *rest)

    monkeypatch.setattr(Builder, 'create_dot', widen_and_multiply)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('rows', [1, 2, 4])
def test_kernel_gradient_by_tensor_cores(
    candidates, kernels, dots_of_bfloat16, rows, dtype
):
    """Of a random problem; infinite and NaN where plain PyTorch says so."""
    candidates([c for c in kernels.CONFIGS if c.kwargs['ROWS'] == rows])
    kernel = random.randint(1, 8), random.randint(7, 8)
    padding = random.randint(0, 4), random.randint(0, 4)
    group_channels, groups = random.randint(9, 16), random.randint(1, 3)
    shape = (2, groups * group_channels, *random.choices(range(8, 18), k=2))
    layout = random.choice([*LAYOUTS.values()])
    *_, call = problem(shape, groups, kernel, 1, padding, 1, dtype, layout)
    chosen = triton.choose_grad_weight(
        *(dtype, group_channels, kernel[1], (1, 1), (1, 1))
    )
    assert chosen == 'grad_weight_banded'
    assert_close('grad_weight', call)
    grad = call[0]
    middle = [side // 2 for side in grad.shape]
    grad[0, 0, 0, 0], grad[tuple(middle)] = torch.inf, torch.nan
    ours, right = triton.grad_weight(*call), exact('grad_weight', call)
    assert torch.equal(ours.isnan(), right.isnan())
    assert torch.equal(ours.isinf(), right.isinf())
    assert right.isnan().any() and not right.isnan().all()


@pytest.mark.parametrize(
    'change, chosen',
    [
        ({}, 'grad_weight_banded'),
        (dict(dtype=torch.float32), 'grad_weight'),
        (dict(group_channels=8), 'grad_weight'),
        (dict(group_channels=17), 'grad_weight'),
        (dict(kw=6), 'grad_weight'),
        (dict(kw=9), 'grad_weight'),
        (dict(stride=(2, 1)), 'grad_weight'),
        (dict(dilation=(1, 2)), 'grad_weight'),
        (dict(version='3.4.0'), 'grad_weight'),
    ],
    ids=str,
)
def test_tensor_cores_take_what_they_are_fast_at(monkeypatch, change, chosen):
    import triton as compiler

    problem = dict(dtype=torch.float16, group_channels=16, kw=7)
    problem |= dict(stride=(1, 1), dilation=(1, 1), version='3.5.1') | change
    monkeypatch.setattr(compiler, '__version__', problem.pop('version'))
    assert triton.choose_grad_weight(**problem) == chosen


def test_mixed_memory_formats():
    """Gradients of a format of their own, and one that is expanded."""
    forward, grad_input, grad_weight = problem(
        *((2, 4, 6, 5), 2, (3, 3), 1, 1, 1), torch.float64, torch.channels_last
    )
    grad, *rest = grad_weight
    assert_close('grad_weight', (grad.contiguous(), *rest))
    assert_close('grad_weight', (grad[:1, :1].expand_as(grad), *rest))
    x, weight, *arguments = forward
    weight = weight.transpose(4, 5).contiguous().transpose(4, 5)
    assert_close('forward', (x, weight, *arguments))


def test_one_output_pixel_of_a_channels_last_image():
    """Its memory is contiguous in both formats, the image's is not."""
    calls = problem(
        *((2, 4, 3, 3), 2, (3, 3), 1, 0, 1), torch.float64, torch.channels_last
    )
    for name, arguments in zip(NAMES, calls, strict=True):
        assert_close(name, arguments)


# With a GPU ------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@layout
@pytest.mark.parametrize(
    'shape, groups, kernel, stride',
    [
        ((4, 32, 112, 112), 2, 3, 1),
        ((2, 64, 200, 304), 4, 7, 1),
        ((4, 128, 57, 55), 8, 7, 2),
        ((16, 512, 7, 7), 32, 7, 1),
    ],
    ids=['stem', 'stage 1', 'stride 2, odd', 'stage 4'],
)
def test_real_sizes(shape, groups, kernel, stride, layout, dtype):
    calls = problem(
        *(shape, groups, (kernel, kernel), stride, kernel // 2, 1), dtype, layout
    )
    for name, arguments in zip(NAMES, calls, strict=True):
        assert_close(name, arguments)


@on_gpu
def test_is_the_default():
    assert default_backend('cuda', torch.float32) == 'triton'


@on_gpu
def test_new_image_sizes_compile_nothing(candidates, kernels):
    import triton as compiler

    candidates(kernels.CONFIGS[:1])
    compiled = []

    def run(height, width):
        for name, arguments in zip(
            NAMES,
            problem(
                *((2, 32, height, width), 2, (5, 5), 1, 2, 1),
                *(torch.float32, torch.contiguous_format),
            ),
            strict=True,
        ):
            getattr(triton, name)(*arguments)

    run(16, 16)
    compiler.knobs.runtime.jit_post_compile_hook = lambda **_: compiled.append(1)
    try:
        for height, width in [(1, 1), (16, 17), (31, 64), (128, 96)]:
            run(height, width)
    finally:
        compiler.knobs.runtime.jit_post_compile_hook = None
    assert not compiled


@on_gpu
def test_same_result_every_time_on_the_gpu():
    calls = problem(
        *((4, 64, 56, 56), 4, (7, 7), 1, 3, 1), torch.bfloat16, torch.channels_last
    )
    for name, arguments in zip(NAMES, calls, strict=True):
        function = getattr(triton, name)
        assert torch.equal(function(*arguments), function(*arguments))


@on_gpu
@pytest.mark.parametrize('mode', ['compile', 'graph'])
def test_training_step_compiled_and_captured(mode):
    """Under autocast: outputs and gradients of the plain step, bit for bit."""
    x = torch.randn(4, 32, 28, 28, device='cuda', requires_grad=True)
    weight = torch.randn(4, 2, 7, 7, 28, 28, device='cuda', requires_grad=True)

    def step():
        with torch.autocast('cuda', torch.bfloat16):
            out = involution2d(x, weight, 1, 3)
        grads = torch.autograd.grad(out.float().square().sum(), (x, weight))
        return out.detach(), *grads

    expected = step()
    if mode == 'compile':
        results = torch.compile(step, fullgraph=False)()
    else:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        with torch.no_grad():
            x.mul_(2)
        graph.replay()
        expected = step()
    assert results[0].dtype == torch.bfloat16
    for ours, wanted in zip(results, expected, strict=True):
        assert torch.equal(ours, wanted)


@on_gpu
def test_capture_before_any_tuning(kernels):
    """A graph that is captured first gets the first candidate instead of an error."""
    for name in NAMES:
        getattr(kernels, name).cache.clear()
    x = torch.randn(1, 16, 9, 9, device='cuda')
    weight = torch.randn(1, 1, 3, 3, 9, 9, device='cuda')
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = involution2d(x, weight, 1, 1)
    graph.replay()
    torch.testing.assert_close(out, involution2d(x, weight, 1, 1, backend='tap_sum'))
    assert not kernels.forward.cache
