"""The operators in standard operators of torch, for exporters that know no others.

A sum over K*K shifted images is 150 small operators. Here a window of ``TILE`` outputs
of one row is one matrix product instead: its K rows of pixels, ``[K*width, C/G]``, are
multiplied by a matrix ``[TILE, K*width]`` that has each output's kernel shifted to
where that output lies. Rows are pieces of ``TILE`` pixels, as many as a window reaches
into, and a gather puts the pieces of a window together. The shift is one copy: a row
that is ``stride`` longer than its pitch, read with the pitch, lies ``stride`` further
on. Where kernels are generated, the convolution that spans them writes the zeros
between.

Windows keep the order of the image, rows of it before tiles, so that each transposition
of pixels moves one axis alone: ONNX Runtime took ten times as long for the others. It
transposes, cuts, pads and joins with one thread, but gathers and multiplies with all of
them. So pieces are not cut, and the few channels of a group are transposed by a
multiplication with the identity, which it does in one with the transposition.

Windows and kernels hold 14 and 2 times the values that they are made of. Where sizes
are fixed they are made and multiplied for a few rows of the output after the other, of
as many as a cache holds. Else sizes may be symbols, of torch.export or of
torch.jit.trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 7  # of a feature map's sides at 224 pixels, and the fastest of 4, 7, 8 and 14
STRIP = 2**20  # values of windows and kernels at a time, the fastest of 2**18 to 2**21
PARTS = 8  # of a batch at most, for the file grows with their number
STRIPS = 16  # of a part at most, for the same reason
FEW = 16  # channels of a group at most that a product transposes: 32 gain nothing

_kept = _fixed = False


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


@contextmanager
def fixed_sizes() -> Iterator[None]:
    """Let exporters write for the sizes of their example; not for several threads."""
    global _fixed
    _fixed = True
    try:
        yield
    finally:
        _fixed = False


def involution2d(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """See :func:`mmcls_involution.ops.involution2d`."""
    groups, *kernel_size = _sizes(weight.shape[1:4])
    size = _sizes(weight.shape[4:])
    window = window_of(kernel_size[1], stride[1], dilation[1])

    def of_images(input: Tensor, weight: Tensor) -> Tensor:
        def spread(kernels: Tensor) -> Tensor:
            kernels = kernels.permute(0, 1, 4, 5, 2, 3)  # N, G, Ho, Wo, K, K
            kernels = _spread(kernels, window, stride[1], dilation[1])
            kernels = F.pad(kernels, (0, 0, 0, -size[1] % TILE))
            height, width, pitch = _sizes(kernels.shape[2:])
            return kernels.reshape(-1, groups, height * width, pitch)

        channels = _sizes(input.shape)[1] // groups
        rows = _rows(input, size, channels, kernel_size[0] * window)
        strips = map(spread, _split(weight, rows, 4))
        sizes = channels, rows, kernel_size, size
        return _sum_windows(input, strips, *sizes, stride, padding, dilation)

    return _by_image(of_images, input, weight)


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
    height, width = size = _sizes(reduced.shape[2:])
    window = window_of(kernel_size[1], stride[1], dilation[1])
    span = weight.flatten(1)
    if bias is not None:  # as the weight of one more channel, of ones
        span = torch.cat([span, bias[:, None]], dim=1)
    span = span.unflatten(0, (-1, *kernel_size)).permute(0, 3, 1, 2)  # G, R, K, K
    span = _spread(span, window, stride[1], dilation[1])
    more = 0 if bias is None else 1
    (groups,) = _sizes(span.shape[:1])

    def of_images(input: Tensor, reduced: Tensor) -> Tensor:
        line = width + -width % TILE
        pixels = F.pad(reduced, (0, line - width, 0, 0, 0, more), value=1.0)
        pixels = pixels.reshape(-1, 1, _sizes(pixels.shape)[1], height * line)
        channels = _sizes(input.shape)[1] // groups
        rows = _rows(input, size, channels, kernel_size[0] * window)
        pixels = _split(pixels, rows * line, 3)
        strips = (torch.matmul(some.transpose(2, 3), span) for some in pixels)
        sizes = channels, rows, kernel_size, size
        return _sum_windows(input, strips, *sizes, stride, padding, dilation)

    return _by_image(of_images, input, reduced)


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
    """Pixels of one row that a tile's outputs see, in whole pieces of ``TILE``."""
    pixels = (TILE - 1) * stride + (taps - 1) * dilation + 1
    return pixels + -pixels % TILE


def _spread(kernels: Tensor, window: int, stride: int, dilation: int) -> Tensor:
    """[A, B, ..., K, K] to [A, B, ..., K*window + stride], zeros between the taps."""
    taps = kernels.shape[-1]
    if dilation > 1:
        kernels = F.pad(kernels.unsqueeze(-1), (0, dilation - 1)).flatten(-2)
        kernels = kernels[..., : (taps - 1) * dilation + 1]
    kernels = F.pad(kernels, (0, window - (taps - 1) * dilation - 1))
    return F.pad(kernels.flatten(-2), (0, stride))


def _sizes(sizes: Sequence[int]) -> Sequence[int]:
    return [int(size) for size in sizes] if _fixed else sizes


def _by_image(form: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A function of some images, of one after the other."""
    (batch,) = _sizes(tensors[0].shape[:1])
    parts = (_split(x, -(-batch // PARTS), 0) for x in tensors)
    found = [form(*part) for part in zip(*parts, strict=True)]
    return torch.cat(found) if len(found) > 1 else found[0]


def _rows(input: Tensor, size: Sequence[int], channels: int, columns: int) -> int:
    """Rows of the output that are made at a time: about as many in each strip."""
    height, width = size
    if not _fixed:
        return height
    batch, all_channels = _sizes(input.shape[:2])
    windows = batch * all_channels // channels * ((width + TILE - 1) // TILE)
    rows = STRIP // (windows * columns * (channels + TILE))
    strips = min(STRIPS, -(-height // max(1, rows)))
    return -(-height // strips)


def _split(x: Tensor, length: int, dim: int) -> Sequence[Tensor]:
    (size,) = _sizes(x.shape[dim : dim + 1])
    if not _fixed or length >= size:
        return (x,)
    # Torch's exporter makes the last of equal lengths as long as the others.
    return x.split([min(length, size - i) for i in range(0, size, length)], dim)


def _sum_windows(
    input: Tensor,
    kernels: Iterable[Tensor],
    channels: int,
    rows: int,
    kernel_size: Sequence[int],
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The products of windows, of `channels` each, and kernels.

    A tensor [N, G, rows*tiles*TILE, K*window + stride] has those of `rows` rows.
    """
    height, width = size
    tiles = (width + TILE - 1) // TILE
    window = window_of(kernel_size[1], stride[1], dilation[1])
    columns = kernel_size[0] * window
    pitch = columns + stride[1]

    all_channels, *sides = _sizes(input.shape[1:])
    groups, pieces = all_channels // channels, window // TILE
    line = (tiles - 1) * stride[1] + pieces
    right = line * TILE - sides[1] - padding[1]  # below 0 for pixels no window sees
    lines = sides[0] + 2 * padding[0]
    images = input.reshape(-1, groups, channels, sides[0] * sides[1])
    images = _transposed(images, channels, 3).reshape(-1, groups, *sides, channels)
    images = F.pad(images, (0, 0, padding[1], right, padding[0], padding[0]))
    images = images.reshape(-1, groups, lines * line, TILE * channels)

    def steps(count: int, length: int) -> Tensor:
        return torch.arange(count, device=input.device) * length

    of_outputs = steps(height, stride[0] * line)[:, None] + steps(tiles, stride[1])
    of_taps = steps(kernel_size[0], dilation[0] * line)[:, None] + steps(pieces, 1)
    places = (of_outputs[..., None, None] + of_taps).flatten()

    out = []
    of_rows = _split(places, rows * tiles * kernel_size[0] * pieces, 0)
    for some, places in zip(kernels, of_rows, strict=True):
        count = _sizes(some.shape)[2] // TILE
        some = some.reshape(-1, groups, count, TILE * pitch)
        some = some[..., : TILE * columns]
        some = some.reshape(-1, groups, count, TILE, columns)
        windows = images.index_select(2, places)
        windows = windows.reshape(-1, groups, count, columns, channels)
        out.append(torch.matmul(some, windows))  # N, G, rows*tiles, TILE, C/G
    out = torch.cat(out, dim=2) if len(out) > 1 else out[0]
    out = out.reshape(-1, groups, height * tiles * TILE, channels)
    out = _transposed(out, channels, 2)
    return out.reshape(-1, all_channels, height, tiles * TILE)[..., :width]


def _transposed(x: Tensor, channels: int, dim: int) -> Tensor:
    """[N, G, A, B] to [N, G, B, A], where `channels` are dimension `dim`."""
    x = x.transpose(2, 3)
    if channels > FEW:
        return x
    identity = torch.eye(channels, dtype=x.dtype, device=x.device)
    return torch.matmul(x, identity) if dim == 3 else torch.matmul(identity, x)
