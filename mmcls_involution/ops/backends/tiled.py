"""The fused operator by a backend's plain kernels, one tile after the other.

A tile is some images, or some rows of one image. Kernels are generated for a tile at a
time, used for everything that they are needed for and dropped, so what is in memory of
the kernels, or of their gradient, is :data:`TILE_BYTES` and not a tensor larger than
the input. The gradients are sums over the tiles in one order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..geometry import Pair, Shape, memory_format
from . import choose
from .contract import Problem

# On a CPU a tile stays in the cache; elsewhere it is large enough to fill a GPU.
TILE_BYTES = dict(cpu=4 << 20, other=64 << 20)


@dataclass(frozen=True)
class Tile:
    """Images and rows of the output, and the rows of the input that they read.

    Attributes:
        images: Of input and output.
        rows: Of the output.
        window: First row of the input that the tile reads, and the one behind the last,
            in the padded image: they may be outside the image.
        padding: That is left to do around the window.
    """

    images: slice
    rows: slice
    window: tuple[int, int]
    padding: tuple[int, int]

    def inside(self, height: int) -> slice:
        """The rows of the window that are in an image of that height."""
        top, bottom = (min(max(row, 0), height) for row in self.window)
        return slice(top, bottom)

    def cut(self, input: Tensor) -> Tensor:
        """The window [n, C, h, W] of ``input`` [N, C, H, W]."""
        inside = self.inside(input.shape[2])
        source = input[self.images, :, inside]
        top, bottom = self.window
        if source.shape[2] == bottom - top:
            return source
        shape = (len(source), input.shape[1], bottom - top, input.shape[3])
        window = source.new_zeros(shape)
        window[:, :, inside.start - top : inside.stop - top] = source
        return window

    def clear_outside(self, kernels: Tensor, height: int, stride: Pair, dilation: Pair):
        """Zero what meets rows of the window outside the image.

        ``kernels`` [n, G, Kh, Kw, h, w], or their gradient. To a backend these rows are
        part of the image, and zeros of the window times infinite kernels are NaN.
        """
        top, bottom = self.window
        if top >= 0 and bottom <= height:
            return
        rows = kernels.shape[4]
        for u in range(kernels.shape[2]):
            first = top + u * dilation[0]
            begin = min(max(0, -(first // stride[0])), rows)
            end = min(max(begin, -((first - height) // stride[0])), rows)
            kernels[:, :, u, :, :begin] = 0
            kernels[:, :, u, :, end:] = 0


def _tiles(
    kernels_shape: Shape, input: Tensor, stride: Pair, padding: Pair, dilation: Pair
) -> Iterator[Tile]:
    batch, groups, kh, kw, height, width = kernels_shape
    limit = TILE_BYTES['cpu' if input.is_cpu else 'other']
    row_bytes = groups * kh * kw * width * input.element_size()
    # As equal as they can be.
    parts = -(-height * row_bytes // limit)
    rows = max(1, -(-height // parts))
    images = max(1, limit // (row_bytes * height))
    for first in range(0, max(1, batch), images):  # an empty batch has its backend too
        for row in range(0, height, rows):
            end = min(row + rows, height)
            window, left = (0, input.shape[2]), tuple(padding)
            if rows < height:
                top = row * stride[0] - padding[0]
                reach = (end - 1 - row) * stride[0] + (kh - 1) * dilation[0] + 1
                window, left = (top, top + reach), (0, padding[1])
            yield Tile(slice(first, first + images), slice(row, end), window, left)


def generate(reduced: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Kernels [N, G*Kh*Kw, H*W] from the reduced map [N, R, H, W], contiguous."""
    pixels = reduced.flatten(2)
    weight = weight.flatten(1).expand(len(pixels), -1, -1)
    if bias is None:
        return torch.bmm(weight, pixels)
    return torch.baddbmm(bias[:, None], weight, pixels)


def forward(
    backend: str,
    input: Tensor,
    reduced: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernels_shape: Shape,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """See :func:`mmcls_involution.ops.fused_involution2d`.

    ``backend`` is the name of one or empty, which leaves the choice to each tile;
    ``kernels_shape`` the shape ``[N, G, Kh, Kw, Ho, Wo]`` of all kernels at once.
    """
    out = torch.empty(
        (*input.shape[:2], *kernels_shape[4:]),
        dtype=input.dtype,
        device=input.device,
        memory_format=memory_format(input),
    )
    for tile in _tiles(kernels_shape, input, stride, padding, dilation):
        part = reduced[tile.images, :, tile.rows]
        shape = (len(part), *kernels_shape[1:4], *part.shape[2:])
        generated = generate(part, weight, bias).view(shape)
        tile.clear_outside(generated, input.shape[2], stride, dilation)
        window, arguments = tile.cut(input), (stride, tile.padding, dilation)
        problem = Problem.of('forward', window, window.shape, shape, *arguments)
        out[tile.images, :, tile.rows] = choose(backend, problem).forward(
            window, generated, *arguments
        )
    return out


def backward(
    backend: str,
    grad: Tensor,
    input: Tensor,
    reduced: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernels_shape: Shape,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of :func:`forward` in input, reduced map, weight and bias.

    None for those that are not ``needed``.
    """
    height = input.shape[2]
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    matrix = weight.flatten(1)
    grad_input, grad_reduced, grad_weight, grad_bias = (
        torch.zeros_like(tensor, dtype=dtype) if need else None
        for tensor, dtype, need in (
            (input, input.dtype, needed[0]),
            (reduced, reduced.dtype, needed[1]),
            # Sums over the tiles.
            (matrix, wide, needed[2]),
            (bias, wide, needed[3]),
        )
    )
    for tile in _tiles(kernels_shape, input, stride, padding, dilation):
        grad_part = grad[tile.images, :, tile.rows]
        part = reduced[tile.images, :, tile.rows]
        shape = (len(part), *kernels_shape[1:4], *part.shape[2:])
        window, arguments = tile.cut(input), (stride, tile.padding, dilation)
        plan = (window.shape, shape, *arguments)
        if grad_input is not None:
            generated = generate(part, weight, bias).view(shape)
            problem = Problem.of('grad_input', grad_part, *plan)
            result = choose(backend, problem).grad_input(
                grad_part, generated, window.shape[2:], *arguments
            )
            del generated  # before memory of the same size is taken for its gradient
            inside, top = tile.inside(height), tile.window[0]
            result = result[:, :, inside.start - top : inside.stop - top]
            grad_input[tile.images, :, inside] += result
        if any(needed[1:]):
            problem = Problem.of('grad_weight', window, *plan)
            result = choose(backend, problem).grad_weight(
                grad_part, window, shape, *arguments
            )
            tile.clear_outside(result, height, stride, dilation)
            result = result.flatten(1, 3).flatten(2)
            if grad_reduced is not None:
                pixels = torch.matmul(matrix.t(), result)
                grad_reduced[tile.images, :, tile.rows] = pixels.view(part.shape)
            if grad_weight is not None:
                products = torch.bmm(result, part.flatten(2).transpose(1, 2))
                grad_weight += products.sum(0, dtype=wide)
            if grad_bias is not None:
                grad_bias += result.sum((0, 2), dtype=wide)
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype).view(weight.shape)
    if grad_bias is not None:
        grad_bias = grad_bias.to(bias.dtype)
    return [grad_input, grad_reduced, grad_weight, grad_bias]
