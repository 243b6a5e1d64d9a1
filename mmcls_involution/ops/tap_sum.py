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
    input_size: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
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
    """[N, C, H, W] to [N, G, C/G, H, W], half precision as float32; a view if it can."""
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    return x.unflatten(1, (groups, x.size(1) // groups))


def _zeros(like: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """Zeros [N, channels, *size] to sum in, in the memory format of ``like``."""
    channels_last = like.is_contiguous(memory_format=torch.channels_last)
    return torch.empty(
        (like.size(0), channels, *size),
        dtype=torch.promote_types(like.dtype, torch.float32),
        device=like.device,
        memory_format=torch.channels_last
        if channels_last and not like.is_contiguous()
        else torch.contiguous_format,
    ).zero_()


def forward(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """See :func:`mmcls_involution.ops.involution2d`."""
    groups, size = weight.size(1), weight.shape[4:]
    out = _zeros(input, input.size(1), size)
    out_view, x, w = _grouped(out, groups), _grouped(input, groups), weight.unsqueeze(2)
    for src, tap, dst in _taps(
        input.shape[2:], weight.shape, stride, padding, dilation
    ):
        out_view[dst].addcmul_(x[src], w[tap])
    return out.to(input.dtype)


def grad_input(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Gradient of :func:`forward` in ``input``, of spatial size ``input_size``."""
    groups = weight.size(1)
    out = _zeros(grad, grad.size(1), input_size)
    out_view, g, w = _grouped(out, groups), _grouped(grad, groups), weight.unsqueeze(2)
    for src, tap, dst in _taps(input_size, weight.shape, stride, padding, dilation):
        out_view[src].addcmul_(g[dst], w[tap])
    return out.to(grad.dtype)


def grad_weight(
    grad: Tensor,
    input: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Gradient of :func:`forward` in ``weight``, of shape ``weight_shape``."""
    groups = weight_shape[1]
    out = grad.new_zeros(weight_shape)
    g, x = _grouped(grad, groups), _grouped(input, groups)
    for src, tap, dst in _taps(
        input.shape[2:], weight_shape, stride, padding, dilation
    ):
        out[tap] = (g[dst] * x[src]).sum(2)
    return out
