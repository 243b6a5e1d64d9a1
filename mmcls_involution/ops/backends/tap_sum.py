"""Involution as a sum over the K*K taps of the kernel, in plain PyTorch.

For each tap (u, v) the input, shifted by that tap, is multiplied by the tap's
plane of the kernel and added to the output: views and one in-place addcmul, no
K*K copy of the input and no padded one (a tap that would read the padding is
clipped to the outputs that read the image). The gradients run over the same
taps, so every sum has a fixed order and the results are deterministic.

Half-precision tensors are summed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..geometry import Pair, Shape, memory_format
from .contract import Problem


def _valid_range(size: int, out_size: int, offset: int, stride: int) -> slice:
    """Outputs ``o`` for which ``o * stride + offset`` lies in ``[0, size)``."""
    first = max(0, -(offset // stride))
    last = min(out_size - 1, (size - 1 - offset) // stride)
    return slice(first, max(first, last + 1))


def _source(out: slice, offset: int, stride: int) -> slice:
    """Input positions that the outputs ``out`` read."""
    start = out.start * stride + offset
    return slice(start, start + (out.stop - out.start - 1) * stride + 1, stride)


def _taps(
    input_size: Pair, weight_shape: Shape, stride: Pair, padding: Pair, dilation: Pair
) -> Iterator[tuple[tuple, tuple, tuple]]:
    """Per tap that reads the image: indices into input, weight and output."""
    axes = []
    for axis in range(2):
        kernel, out_size = weight_shape[2 + axis], weight_shape[4 + axis]
        taps = []
        for k in range(kernel):
            offset = k * dilation[axis] - padding[axis]
            out = _valid_range(input_size[axis], out_size, offset, stride[axis])
            if out.start < out.stop:
                taps.append((k, out, _source(out, offset, stride[axis])))
        axes.append(taps)
    for u, rows, in_rows in axes[0]:
        for v, cols, in_cols in axes[1]:
            yield (..., in_rows, in_cols), (..., u, v, rows, cols), (..., rows, cols)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[N, C, H, W] to [N, G, C/G, H, W]; half precision as a float32 copy."""
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    return x.unflatten(1, (groups, x.size(1) // groups))


def _zeros(like: Tensor, size: Sequence[int]) -> Tensor:
    """Zeros [N, C, *size] to sum in; batch, channels and format of ``like``."""
    return torch.empty(
        (*like.shape[:2], *size),
        dtype=torch.promote_types(like.dtype, torch.float32),
        device=like.device,
        memory_format=memory_format(like),
    ).zero_()


def supports(problem: Problem) -> None:
    """Everything."""


def forward(
    input: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """See :func:`mmcls_involution.ops.involution2d`."""
    groups, w, size = weight.size(1), weight.unsqueeze(2), input.shape[2:]
    out = _zeros(input, weight.shape[4:])
    y, x = _grouped(out, groups), _grouped(input, groups)
    for src, tap, dst in _taps(size, weight.shape, stride, padding, dilation):
        y[dst].addcmul_(x[src], w[tap])
    return out.to(input.dtype)


def grad_input(
    grad: Tensor,
    weight: Tensor,
    input_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """Gradient of :func:`forward` in ``input``, of spatial size ``input_size``."""
    groups, w = weight.size(1), weight.unsqueeze(2)
    out = _zeros(grad, input_size)
    x, g = _grouped(out, groups), _grouped(grad, groups)
    for src, tap, dst in _taps(input_size, weight.shape, stride, padding, dilation):
        x[src].addcmul_(g[dst], w[tap])
    return out.to(grad.dtype)


def grad_weight(
    grad: Tensor,
    input: Tensor,
    weight_shape: Shape,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """Gradient of :func:`forward` in ``weight``, of shape ``weight_shape``."""
    groups, size = weight_shape[1], input.shape[2:]
    out = grad.new_zeros(weight_shape)
    g, x = _grouped(grad, groups), _grouped(input, groups)
    for src, tap, dst in _taps(size, weight_shape, stride, padding, dilation):
        out[tap] = (g[dst] * x[src]).sum(2)
    return out
