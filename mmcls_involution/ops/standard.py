"""The operators in standard operators of torch, for exporters that know no others.

A sum over K*K shifted images is 150 small operators. Here a window of ``TILE`` outputs
of one row is one matrix product instead: its K rows of pixels, ``[K*width, C/G]``, are
multiplied by a matrix ``[TILE, K*width]`` that has each output's kernel shifted to
where that output lies. Slices cut the rows into windows, and a gather puts K of them
together. The shift is one copy: a row that is ``stride`` longer than its pitch, read
with the pitch, lies ``stride`` further on. Where kernels are generated, the convolution
that spans them writes the zeros between.

Windows keep the order of the image, rows of it before tiles, so that each transposition
of pixels moves one axis alone: ONNX Runtime took ten times as long for the others.

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
    columns = weight.shape[3]
    window = window_of(columns, stride[1], dilation[1])
    kernels = weight.permute(0, 1, 4, 5, 2, 3)  # N, G, Ho, Wo, K, K
    kernels = _spread(kernels.flatten(1, 2), window, stride[1], dilation[1])
    kernels = F.pad(kernels, (0, 0, 0, -weight.shape[5] % TILE))
    return _sum_windows(
        input,
        kernels.unflatten(1, (weight.shape[1], -1)).flatten(2, 3),
        weight.shape[2:4],
        weight.shape[4:],
        stride,
        padding,
        dilation,
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
    height, width = reduced.shape[2:]
    window = window_of(kernel_size[1], stride[1], dilation[1])
    span = weight.flatten(1)
    if bias is not None:  # as the weight of one more channel, of ones
        span = torch.cat([span, bias[:, None]], dim=1)
    span = span.unflatten(0, (-1, *kernel_size)).permute(0, 3, 1, 2)  # G, R, K, K
    span = _spread(span, window, stride[1], dilation[1])
    more = 0 if bias is None else 1
    pixels = F.pad(reduced, (0, -width % TILE, 0, 0, 0, more), value=1.0)
    pixels = pixels.flatten(2).transpose(1, 2).unsqueeze(1)
    return _sum_windows(
        input,
        torch.matmul(pixels, span),
        kernel_size,
        (height, width),
        stride,
        padding,
        dilation,
    )


def involution2d_by_rows(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Without tiles, a row of taps at a time, for ``torch.export`` of any size.

    It takes over from its example whether a width fills the last tile, and its programs
    refuse images for which that is otherwise.
    """
    groups, rows, columns, height, width = weight.shape[1:]
    images = F.pad(input, (0, 0, padding[0], padding[0]))
    out = None
    for u in range(rows):
        first = u * dilation[0]
        lines = images[:, :, first : first + (height - 1) * stride[0] + 1]
        pixels = F.unfold(
            lines[:, :, :: stride[0]],
            (1, columns),
            dilation=(1, dilation[1]),
            padding=(0, padding[1]),
            stride=(1, stride[1]),
        )
        pixels = pixels.unflatten(2, (height, width)).unflatten(1, (-1, columns))
        pixels = pixels.unflatten(1, (groups, -1))  # N, G, C/G, Kw, Ho, Wo
        part = (pixels * weight[:, :, None, u]).sum(3)
        out = part if out is None else out + part
    return out.flatten(1, 2)


def fused_involution2d_by_rows(
    input: Tensor,
    reduced: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    *arguments: Sequence[int],
) -> Tensor:
    """See :func:`involution2d_by_rows`."""
    kernels = F.conv2d(reduced, weight, bias).unflatten(1, (-1, *kernel_size))
    return involution2d_by_rows(input, kernels, *arguments)


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
    """The product of kernels [N, G, Ho*tiles*TILE, K*window + stride] and windows."""
    height, width = size
    groups, pitch = kernels.shape[1], kernels.shape[3]
    tiles = (width + TILE - 1) // TILE
    window = window_of(kernel_size[1], stride[1], dilation[1])
    columns = kernel_size[0] * window
    kernels = kernels.reshape(-1, groups, height * tiles, TILE * pitch)
    kernels = kernels[..., : TILE * columns].unflatten(3, (TILE, columns))

    # A row of pixels is cut where tiles begin. A window is such a piece and the next,
    # or as many as it reaches into.
    channels, step = input.shape[1] // groups, TILE * stride[1]
    pieces = (window + step - 1) // step
    right = (tiles + pieces - 1) * step - input.shape[3] - padding[1]
    # A stride may leave pixels that no window sees, and `right` would be negative.
    pad = (0, 0, padding[1], right + stride[1], padding[0], padding[0])
    images = input.reshape(-1, groups, channels, input.shape[2] * input.shape[3])
    images = images.transpose(2, 3).unflatten(2, input.shape[2:])
    images = F.pad(images, pad)
    strips = []
    for first in range(0, pieces * step, step):
        strip = images[:, :, :, first : first + tiles * step]
        strip = strip.reshape(-1, groups, images.shape[2] * tiles, step * channels)
        last = window - first < step
        strips.append(strip[..., : (window - first) * channels] if last else strip)
    strips = torch.cat(strips, dim=3)
    device = input.device
    lines = torch.arange(height, device=device) * stride[0] * tiles
    lines = lines[:, None, None] + torch.arange(tiles, device=device)[:, None]
    taps = torch.arange(kernel_size[0], device=device) * dilation[0] * tiles
    windows = strips.index_select(2, (lines + taps).flatten())
    windows = windows.reshape(-1, groups, height * tiles, columns, channels)

    out = torch.matmul(kernels, windows)  # N, G, Ho*tiles, TILE, C/G
    out = out.flatten(2, 3).transpose(2, 3).unflatten(3, (height, tiles * TILE))
    return out[..., :width].flatten(1, 2)
