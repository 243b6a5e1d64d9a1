"""What the C++ kernels add to test_involution2d: instruction sets, threads, memory."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import exact_and_scale

from mmcls_involution.ops import output_size
from mmcls_involution.ops.backends import native, tap_sum
from mmcls_involution.ops.backends.contract import Problem

REASON = native.supports(Problem.typical('cpu', torch.float32))
built = pytest.mark.skipif(bool(REASON), reason=f'{REASON}')
SOURCES = Path(native.__file__).parent
NAMES = ('forward', 'grad_input', 'grad_weight')


@pytest.fixture(params=[b'avx512', b'avx2', b'baseline'], ids=bytes.decode)
def instruction_set(request):
    """The one that the kernels use during the test."""
    library = native._library()
    best = library.involution_instruction_set()
    if library.involution_use_instruction_set(request.param):
        pytest.skip(f'this processor has no {request.param.decode()}')
    yield request.param
    library.involution_use_instruction_set(best)


def problem(rng, dtype):
    """Tensors and arguments of the three operations, in the order of NAMES."""

    def pair(low, high):
        return rng.randint(low, high), rng.randint(low, high)

    # Rows of 3 and 7 taps have inner loops of their own.
    kernel = rng.choice([pair(1, 5), (3, 3), (7, 7)])
    stride, padding, dilation = pair(1, 3), pair(0, 5), rng.choice([(1, 1), pair(1, 3)])
    width = rng.choice([rng.randint(1, 30), rng.randint(250, 270)])
    size = rng.randint(1, 20), width
    out_size = output_size(size, kernel, stride, padding, dilation)
    if min(out_size) < 1:
        return problem(rng, dtype)
    n, groups, per_group = rng.randint(1, 2), rng.randint(1, 3), rng.randint(1, 34)
    x = torch.randn(n, groups * per_group, *size).to(dtype)
    weight = torch.randn(n, groups, *kernel, *out_size).to(dtype)
    grad = torch.randn(n, groups * per_group, *out_size).to(dtype)
    arguments = stride, padding, dilation
    return (
        (x, weight, *arguments),
        (grad, weight, size, *arguments),
        (grad, x, weight.shape, *arguments),
    )


def fused_arguments(rng, x, weight, *arguments):
    """Those of ``native.fused_forward``: something to generate such kernels from."""
    n, groups, kh, kw, *size = weight.shape
    rows, channels = groups * kh * kw, rng.randint(1, 40)
    reduced = torch.randn(n, channels, *size).to(x.dtype)
    span = torch.randn(rows, channels, 1, 1).to(x.dtype)
    bias = torch.randn(rows).to(x.dtype) if rng.random() < 0.5 else None
    return x, reduced, span, bias, (kh, kw), *arguments


def run(module, name, arguments):
    return getattr(module, name)(*arguments)


@built
@pytest.mark.parametrize('dtype', native.DTYPES, ids=str)
def test_random_problems(instruction_set, dtype):
    """Within rounding of float64, the error of one rounding for half precision."""
    rng = random.Random(f'{instruction_set}{dtype}')
    for _ in range(40):
        for name, arguments in zip(NAMES, problem(rng, dtype), strict=True):
            ours = run(native, name, arguments)
            assert ours.dtype == dtype
            exact, scale = exact_and_scale(name, arguments)
            tolerance = 4 if dtype in (torch.float32, torch.float64) else 0.51
            bound = tolerance * torch.finfo(dtype).eps * scale
            error = (ours.double() - exact).abs()
            assert (error <= bound).all(), (name, arguments[2:])


@built
@pytest.mark.parametrize('dtype', native.DTYPES, ids=str)
def test_channels_last_gives_the_same(instruction_set, dtype):
    """Kernels as a channels_last convolution makes them."""
    rng = random.Random(f'{instruction_set}{dtype}')
    for _ in range(40):
        x, weight, *arguments = problem(rng, dtype)[0]
        expected = native.forward(x, weight, *arguments)
        groups = weight.shape[1:4]
        weight = weight.flatten(1, 3).contiguous(memory_format=torch.channels_last)
        weight = weight.unflatten(1, groups)
        for image in (x, x.contiguous(memory_format=torch.channels_last)):
            out = native.forward(image, weight, *arguments)
            torch.testing.assert_close(out, expected)


@built
@pytest.mark.parametrize('dtype', native.DTYPES, ids=str)
def test_channels_last_gradients_are_the_same(instruction_set, dtype):
    rng = random.Random(f'gradients{instruction_set}{dtype}')
    for _ in range(40):
        for name, arguments in list(zip(NAMES, problem(rng, dtype), strict=True))[1:]:
            expected = run(native, name, arguments)
            first, second, *rest = (
                a.contiguous(memory_format=torch.channels_last)
                if torch.is_tensor(a) and a.dim() == 4
                else a
                for a in arguments
            )
            ours = run(native, name, (first, second, *rest))
            torch.testing.assert_close(ours, expected)


@built
@pytest.mark.parametrize('dtype', native.DTYPES, ids=str)
def test_fused_forward(instruction_set, dtype):
    """Kernels generated within, against float64."""
    rng = random.Random(f'fused{instruction_set}{dtype}')
    tolerance = 8 if dtype in (torch.float32, torch.float64) else 0.51
    for _ in range(40):
        x, *generator, size, stride, padding, dilation = fused_arguments(
            rng, *problem(rng, dtype)[0]
        )
        arguments = stride, padding, dilation
        doubles = [None if t is None else t.double() for t in generator]
        kernels = torch.nn.functional.conv2d(*doubles).unflatten(1, (-1, *size))
        exact = tap_sum.forward(x.double(), kernels, *arguments)
        for layout in (torch.contiguous_format, torch.channels_last):
            image = x.contiguous(memory_format=layout)
            ours = native.fused_forward(image, *generator, size, *arguments)
            error = (ours.double() - exact).abs().max() / exact.abs().max().clamp(1e-30)
            assert error <= tolerance * torch.finfo(dtype).eps


@built
@pytest.mark.parametrize('value', [0.0, 6e-8, 65504.0, 1e38, torch.inf, torch.nan])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_extreme_values_convert_as_in_torch(dtype, value):
    """A kernel of one tap of weight 1 copies its input."""
    x = torch.tensor([value, -value, value / 3]).to(dtype).view(1, 3, 1, 1)
    weight = torch.ones(1, 1, 1, 1, 1, 1, dtype=dtype)
    out = native.forward(x, weight, (1, 1), (0, 0), (1, 1))
    torch.testing.assert_close(out, x, rtol=0, atol=0, equal_nan=True)


@built
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_results_round_as_in_torch(dtype):
    """Products of two half-precision numbers are exact in float32."""
    x = torch.randn(1, 64, 9, 33).to(dtype)
    weight = (torch.randn(1, 1, 1, 1, 9, 33) * 2.0 ** torch.randint(-14, 4, ())).to(
        dtype
    )
    out = native.forward(x, weight, (1, 1), (0, 0), (1, 1))
    expected = (x.float() * weight.float().view(1, 1, 9, 33)).to(dtype)
    assert torch.equal(out, expected)


@built
def test_threads_do_not_change_the_result(monkeypatch):
    rng = random.Random(0)
    threads = torch.get_num_threads()
    try:
        for _ in range(10):
            calls = problem(rng, torch.float32)
            fused = fused_arguments(rng, *calls[0])
            for name, arguments in zip(
                (*NAMES, 'fused_forward'), (*calls, fused), strict=True
            ):
                results = []
                for count in (1, 2, 5):
                    torch.set_num_threads(count)
                    results.append(run(native, name, arguments))
                with monkeypatch.context() as patch:  # torch < 2.10
                    patch.setattr(native, '_parallel_for', lambda: None)
                    results.append(run(native, name, arguments))
                assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(threads)


@built
@pytest.mark.parametrize('name', NAMES)
def test_windows_past_all_numbers_are_refused(instruction_set, name):
    """Two sides of 2**31 pixels, 2 channels, 4 bytes: 2**65."""
    x, weight = torch.randn(1, 4, 3, 3), torch.randn(1, 2, 3, 3, 3, 3)
    tensors = (x, weight), (x, weight, (3, 3)), (x, x, weight.shape)
    arguments = (1, 1), (2**30, 2**30), (2**30, 2**30)
    with pytest.raises(MemoryError, match='no memory for the scratch'):
        run(native, name, (*tensors[NAMES.index(name)], *arguments))


WITHOUT_THREADS = """
import resource, torch
from mmcls_involution.ops.backends import native

native._parallel_for = lambda: None  # torch < 2.10
x, weight = torch.randn(4, 16, 64, 64), torch.randn(4, 2, 3, 3, 64, 64)
arguments = x, weight, (1, 1), (1, 1), (1, 1)
expected = native.forward(*arguments)
torch.set_num_threads(8)
with open('/proc/self/statm') as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 5 * 2**29, -1))
out = native.forward(*arguments)
torch.set_num_threads(1)
assert torch.equal(out, expected)
"""


@built
@pytest.mark.skipif(
    sys.platform != 'linux', reason='limits of memory are those of Linux'
)
def test_threads_that_do_not_start_are_done_without():
    """Stacks of 1 GiB, and memory for two of seven: a container's limit is like it."""

    def large_stacks():
        import resource  # Windows has none

        hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
        resource.setrlimit(resource.RLIMIT_STACK, (2**30, hard))

    result = subprocess.run(
        [sys.executable, '-c', WITHOUT_THREADS],
        env=os.environ | {'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1'},
        preexec_fn=large_stacks,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_missing_library_is_said_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(native, '__file__', str(tmp_path / '__init__.py'))
    native._library.cache_clear()
    try:
        for _ in range(2):
            reason = native.supports(Problem.typical('cpu', torch.float32))
            assert reason == (
                'the C++ kernels were not built; install with a C++ compiler'
            )
    finally:
        native._library.cache_clear()
    assert caplog.text.count('C++ kernels of involution are not in use') == 1


@pytest.mark.skipif(shutil.which('g++') is None, reason='g++ is not installed')
@pytest.mark.parametrize(
    'level, number',
    [
        # A third of the time to compile, and no access is optimized away.
        ('-O0', 500),
        pytest.param('-O1', 5000, marks=pytest.mark.long),
    ],
)
def test_sanitizers_find_nothing(level, number, tmp_path):
    program = tmp_path / 'fuzz_native'
    flags = ['-std=c++17', level, '-pthread', f'-I{SOURCES}']
    sanitizers = ['-fsanitize=address,undefined', '-fno-sanitize-recover=all']
    sources = [Path(__file__).with_name('fuzz_native.cpp'), *SOURCES.glob('*.cpp')]
    subprocess.run(
        ['g++', *flags, *sanitizers, *map(str, sources), '-o', str(program)], check=True
    )
    command = [str(program), str(number), str(random.randrange(2**31))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, (command, result.stdout + result.stderr)
    assert f'{number} problems agree' in result.stdout
