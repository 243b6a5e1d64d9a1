"""The operators in standard operators of torch, for exporters that know no others.

A sum over K*K shifted images is 150 small operators. Here a window of ``TILE`` outputs
of one row is one matrix product instead: its K rows of pixels, ``[K*width, C/G]``, are
multiplied by a matrix ``[TILE, K*width]`` that has each output's kernel shifted to
where that output lies. Slices cut the rows into windows, and a gather puts K of them
together. The shift costs nothing: a row that is ``stride`` longer than its pitch, read
with the pitch, lies ``stride`` further on. Where kernels are generated, the convolution
that spans them writes the zeros between.

Sizes may be symbols, of torch.export or of torch.jit.trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 7  # of a feature map's sides at 224 pixels, and the fastest of 4, 7, 8 and 14


_kept = False


def exporting() -> bool:
    """Whether an exporter to ONNX, either of the two, is to see this form now."""
    return torch.onnx.is_in_onnx_export() and not _kept


@contextmanager
def kept() -> Iterator[None]:
    """Let exporters see the operators themselves; not for several threads at once."""
    global _kept
    _kept = True
    try:
        yield
    finally:
        _kept = False


def involution2d(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """See :func:`mmcls_involution.ops.involution2d`."""
    rows, columns = weight.shape[2:4]
    groups, (height, width) = weight.shape[1], weight.shape[4:]
    window = window_of(columns, stride[1], dilation[1])
    kernels = weight.permute(0, 1, 4, 5, 2, 3).flatten(1, 2)  # N, G*Ho, Wo, K, K
    kernels = _spread(kernels, window, stride[1], dilation[1])
    kernels = kernels.reshape(-1, groups, height, width, rows * window + stride[1])
    tiles = (width + TILE - 1) // TILE
    kernels = F.pad(kernels, (0, 0, 0, tiles * TILE - width))
    kernels = kernels.unflatten(3, (-1, TILE)).transpose(2, 3)
    return _sum_windows(
        input, kernels, (rows, columns), (height, width), stride, padding, dilation
    )


def fused_involution2d(
    input: Tensor,
    reduced: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """See :func:`mmcls_involution.ops.fused_involution2d`."""
    channels, height, width = reduced.shape[1:]
    window = window_of(kernel_size[1], stride[1], dilation[1])
    span = weight.flatten(1)
    if bias is not None:  # as the weight of one more channel, of ones
        span = torch.cat([span, bias[:, None]], dim=1)
    span = span.unflatten(0, (-1, *kernel_size)).permute(0, 3, 1, 2)  # G, R, K, K
    span = _spread(span, window, stride[1], dilation[1])
    tiles = (width + TILE - 1) // TILE
    more = 0 if bias is None else 1
    pixels = F.pad(reduced, (0, tiles * TILE - width, 0, 0, 0, more), value=1.0)
    pixels = pixels.reshape(-1, channels + more, height, tiles, TILE)
    pixels = pixels.permute(0, 3, 2, 4, 1).flatten(1, 3).unsqueeze(1)
    kernels = torch.matmul(pixels, span)  # N, G, tiles*Ho*TILE, K*window + stride
    kernels = kernels.reshape(-1, span.shape[0], tiles, height, TILE, span.shape[2])
    return _sum_windows(
        input, kernels, kernel_size, (height, width), stride, padding, dilation
    )


def grad_of_weight(
    grad: Tensor,
    input: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Products of each output pixel with its window: the attention generators' own."""
    groups, rows, columns, height, width = weight_shape[1:]
    pad = (padding[1], padding[1], padding[0], padding[0])
    images = F.pad(input, pad).unflatten(1, (groups, -1))
    grad = grad.unflatten(1, (groups, -1))
    taps = [
        (
            grad
            * images[
                ...,
                u * dilation[0] : u * dilation[0] + (height - 1) * stride[0] + 1,
                v * dilation[1] : v * dilation[1] + (width - 1) * stride[1] + 1,
            ][..., :: stride[0], :: stride[1]]
        ).sum(2)
        for u in range(rows)
        for v in range(columns)
    ]
    return torch.stack(taps, dim=2).unflatten(2, (rows, columns))


def window_of(taps: int, stride: int, dilation: int) -> int:
    """Pixels of one row that a tile's outputs see."""
    return (TILE - 1) * stride + (taps - 1) * dilation + 1


def _spread(kernels: Tensor, window: int, stride: int, dilation: int) -> Tensor:
    """[A, B, ..., K, K] to [A, B, ..., K*window + stride], zeros between the taps."""
    taps = kernels.shape[-1]
    if dilation > 1:
        kernels = F.pad(kernels.unsqueeze(-1), (0, dilation - 1)).flatten(-2)
        kernels = kernels[..., : (taps - 1) * dilation + 1]
    kernels = F.pad(kernels, (0, window - (taps - 1) * dilation - 1))
    return F.pad(kernels.flatten(-2), (0, stride))


def _sum_windows(
    input: Tensor,
    kernels: Tensor,
    kernel_size: Sequence[int],
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The product of kernels [N, G, tiles, Ho, TILE, K*window + stride] and windows."""
    height, width = size
    groups, tiles, pitch = kernels.shape[1], kernels.shape[2], kernels.shape[5]
    window = window_of(kernel_size[1], stride[1], dilation[1])
    columns = kernel_size[0] * window
    kernels = kernels.reshape(-1, groups, tiles, height, TILE * pitch)
    kernels = kernels[..., : TILE * columns].unflatten(4, (TILE, columns))

    # A row of pixels is cut where tiles begin. A window is such a piece and the next,
    # or as many as it reaches into.
    channels, step = input.shape[1] // groups, TILE * stride[1]
    pieces = (window + step - 1) // step
    right = (tiles + pieces - 1) * step - input.shape[3] - padding[1]
    # A stride may leave pixels that no window sees, and `right` would be negative.
    pad = (0, 0, padding[1], right + stride[1], padding[0], padding[0])
    images = input.unflatten(1, (groups, channels)).permute(0, 1, 3, 4, 2)
    images = F.pad(images, pad)
    strips = []
    for first in range(0, pieces * step, step):
        strip = images[:, :, :, first : first + tiles * step]
        strip = strip.reshape(-1, groups, images.shape[2], tiles, step * channels)
        strips.append(strip[..., : (window - first) * channels])
    strips = torch.cat(strips, dim=4).transpose(2, 3)
    device = input.device
    lines = torch.arange(height, device=device) * stride[0]
    taps = torch.arange(kernel_size[0], device=device) * dilation[0]
    windows = strips.index_select(3, (lines[:, None] + taps).flatten())
    windows = windows.reshape(-1, groups, tiles, height, columns, channels)

    out = torch.matmul(kernels, windows)  # N, G, tiles, Ho, TILE, C/G
    out = out.permute(0, 1, 5, 3, 2, 4).flatten(4)[..., :width]
    return out.flatten(1, 2)
