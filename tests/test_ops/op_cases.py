"""Cases, backends and the oracle that the tests of the operators share."""

import functools

import pytest
import torch

from mmcls_involution.ops import BACKENDS
from mmcls_involution.ops.backends import reference, tap_sum
from mmcls_involution.ops.backends.triton_kernels import LOWEST_TRITON
from mmcls_involution.ops.modules import GENERATORS

# (N, C, H, W), groups, kernel, stride, padding, dilation. Odd sizes and unequal
# sides, so that a swapped axis shows.
CASES = {
    'rednet': ((2, 32, 9, 7), 2, (7, 7), 1, 3, 1),
    'stride 2, odd': ((2, 4, 9, 7), 2, (7, 7), 2, 3, 1),
    'stride 2, even': ((1, 4, 8, 6), 1, (3, 3), 2, 1, 1),
    'unequal sides': ((2, 6, 7, 10), 3, (3, 5), (2, 1), (1, 0), (2, 1)),
    'dilation': ((1, 4, 11, 8), 4, (5, 3), (1, 3), (4, 2), (2, 2)),
    'kernel 1': ((2, 4, 5, 3), 2, (1, 1), 1, 0, 1),
    'one pixel': ((1, 2, 1, 1), 1, (7, 7), 1, 3, 1),
    'far padding': ((1, 2, 2, 3), 1, (3, 3), 3, 5, 1),
    'one row': ((1, 16, 1, 13), 1, (3, 3), 2, 1, 1),
    'empty batch': ((0, 4, 5, 6), 2, (3, 3), 2, 1, 1),
}


def exact(name, arguments):
    """The result in float64, by plain PyTorch."""
    wide = [a.double() if torch.is_tensor(a) else a for a in arguments]
    return getattr(tap_sum, name)(*wide)


def exact_and_scale(name, arguments):
    """The result in float64, and what the error of its rounding is a part of.

    That is the sum of the absolute terms of each value, which may be far above the
    value; in half precision, whose last rounding is all that counts, the largest value.
    """
    right = exact(name, arguments)
    if arguments[0].dtype in (torch.float32, torch.float64):
        terms = [a.abs() if torch.is_tensor(a) else a for a in arguments]
        return right, exact(name, terms)
    return right, right.abs().max() if right.numel() else right


def of_cases(cases):
    names = 'shape, groups, kernel, stride, padding, dilation'
    return pytest.mark.parametrize(names, cases.values(), ids=cases)


case = of_cases(CASES)
# An empty batch has no element to perturb.
case_not_empty = of_cases({k: v for k, v in CASES.items() if k != 'empty batch'})
every_generator = pytest.mark.parametrize('generator', GENERATORS)
TRITON_KERNELS = ('forward', 'grad_input', 'grad_weight', 'grad_weight_banded')
# For pytest.importorskip.
WITH_TRITON = dict(
    modname='triton',
    minversion='.'.join(map(str, LOWEST_TRITON)),
)


# The backends of a device that is not there are left out; test_triton runs theirs
# without one. The fixture `backend` makes new tensors on the device, and skips a test
# in a dtype that the backend does not support.
PLACES = [(name, 'cpu') for name in BACKENDS if name != 'triton']
if torch.cuda.is_available():
    PLACES += [(name, 'cuda') for name in BACKENDS if name != 'native']
backend_name = pytest.mark.parametrize(
    'backend',
    PLACES,
    indirect=True,
    ids=[name if device == 'cpu' else f'{name} on {device}' for name, device in PLACES],
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def oracle(input, weight, *arguments):
    """The reference with PyTorch's own gradients, outside the custom operators."""
    return reference.forward(input, weight, *map(pair, arguments))


def assert_error_is_at_most_twice(ours, pytorch, draw):
    """Root mean square of output and gradients, beside PyTorch's own.

    `draw` makes random tensors, `ours` and `pytorch` map them to the output;
    `pytorch` in float64 is taken for exact. Over several draws, since the few elements
    of a small problem may all be exact in PyTorch by chance.
    """

    def results(function, tensors, grad):
        out = function(*tensors)
        found = [out, *torch.autograd.grad(out, tensors, grad)]
        assert all(result.dtype == grad.dtype for result in found)
        return [result.detach().double() for result in found]

    squares, sizes = [], []
    for _ in range(5):
        tensors = draw()
        wide = [t.detach().double().requires_grad_() for t in tensors]
        grad = torch.randn_like(pytorch(*tensors))
        exact = results(pytorch, wide, grad.double())
        squares.append(
            [
                [
                    (result - right).square().sum() / max(right.numel(), 1)
                    for result, right in zip(
                        results(function, tensors, grad), exact, strict=True
                    )
                ]
                for function in (ours, pytorch)
            ]
        )
        sizes.append([right.abs().max() if right.numel() else 0 for right in exact])
    our, their = torch.tensor(squares).mean(0).sqrt()
    # Half a unit in the last place of the largest one is allowed on top.
    allowed = torch.finfo(grad.dtype).eps * torch.tensor(sizes).amax(0) / 2
    assert (our <= 2 * their + allowed).all(), (our, their, allowed)


@functools.cache
def _pooling_exports() -> bool:
    any_size = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    pool = torch.nn.AvgPool2d(2, 2, ceil_mode=True)
    image = torch.randn(1, 1, 9, 7)
    program = torch.export.export(pool, (image,), dynamic_shapes=(any_size,)).module()
    try:
        program(torch.randn(1, 1, 8, 8))
    except AssertionError:
        return False
    return True


def needs_pooling_of_any_size() -> None:
    """Skip the test where torch exports pooling for odd or for even sizes alone."""
    if not _pooling_exports():
        pytest.skip(f'torch {torch.__version__} exports pooling for odd sizes alone')
