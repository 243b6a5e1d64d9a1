"""Infinities and NaN: what they reach is the same in every backend.

A tap outside the image has no part in anything, whatever its kernel value or the
gradient of its output; all else follows the arithmetic of floating point.
"""

import pytest
import torch
from op_cases import PLACES, WITH_TRITON, oracle, pair
from test_fused import make as make_fused
from test_fused import set_tiles, two_steps
from test_involution2d import make

from mmcls_involution.ops import BACKENDS
from mmcls_involution.ops import fused_involution2d as fused
from mmcls_involution.ops.backends import triton_kernels
from mmcls_involution.ops.backends.contract import Problem

# Groups of 3 channels, which fill no block, but for the wide one; kernel, stride,
# padding, dilation.
CASES = {
    'stride 1': ((1, 6, 5, 6), 2, (3, 3), 1, 1, 1),
    'stride 2': ((1, 6, 7, 6), 2, (3, 3), 2, 1, 1),
    'stride 2, 7x7': ((1, 3, 6, 5), 1, (7, 7), 2, 3, 1),
    'stride 1, 7x7, wide': ((1, 16, 3, 14), 1, (7, 7), 1, 3, 1),
    'stride 3, dilated': ((1, 3, 7, 8), 1, (3, 3), 3, 2, 2),
}
case = pytest.mark.parametrize('problem', CASES.values(), ids=CASES)
# Where there is no GPU, Triton's functions run in its interpreter.
WITHOUT_GPU = [] if ('triton', 'cuda') in PLACES else ['interpreter']
place = pytest.mark.parametrize('place', [*PLACES, *WITHOUT_GPU], ids=str)


def spoil(tensor):
    """An infinity in a corner, a NaN in the middle, of leaves as well."""
    with torch.no_grad():
        tensor.view(-1)[0] = torch.inf
        tensor[tuple(size // 2 for size in tensor.shape)] = torch.nan


def assert_same(ours, right):
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.fixture
def kernels(place):
    """The functions of a backend, and where they run."""
    if place == 'interpreter':
        pytest.importorskip(**WITH_TRITON)
        yield triton_kernels
    else:
        name, device = place
        if reason := BACKENDS[name].supports(Problem.typical(device, torch.float32)):
            pytest.skip(reason)
        with torch.device(device):
            yield BACKENDS[name].kernels


@place
@case
@pytest.mark.parametrize('spoilt', ['input', 'weight', 'grad'])
def test_involution(kernels, problem, spoilt):
    input, weight, arguments = make(*problem, dtype=torch.float32)
    grad = torch.randn_like(oracle(input, weight, *arguments))
    spoil(dict(input=input, weight=weight, grad=grad)[spoilt])
    out = oracle(input, weight, *arguments)
    grad_input, grad_weight = torch.autograd.grad(out, (input, weight), grad)
    right = dict(input=out, weight=out, grad=grad_input)[spoilt]
    assert 0 < right.isfinite().sum() < right.numel()

    input, weight = input.detach(), weight.detach()
    arguments = [pair(value) for value in arguments]
    assert_same(kernels.forward(input, weight, *arguments), out)
    size = input.shape[2:]
    assert_same(kernels.grad_input(grad, weight, size, *arguments), grad_input)
    assert_same(kernels.grad_weight(grad, input, weight.shape, *arguments), grad_weight)


@pytest.mark.parametrize('place', PLACES, ids=str)
@case
@pytest.mark.parametrize('spoilt', range(5))
def test_fused_involution(kernels, place, problem, spoilt, monkeypatch):
    tensors, options = make_fused(*problem, dtype=torch.float32)
    grad = torch.randn_like(two_steps(*tensors, **options))
    spoil([*tensors, grad][spoilt])
    right = two_steps(*tensors, **options)
    right = [right, *torch.autograd.grad(right, tensors, grad)]
    set_tiles(monkeypatch, 1)  # of one row
    out = fused(*tensors, **options, backend=place[0])
    ours = [out, *torch.autograd.grad(out, tensors, grad)]
    for our, their in zip(ours, right, strict=True):
        assert_same(our, their)
