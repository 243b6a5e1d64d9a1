"""Involution in standard operators of ONNX, for torch's newer exporter.

The forms are those of ``ops/standard.py``, which says how they work. That exporter
would take minutes to decompose them for sizes that are symbols; here sizes are read in
the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmcls_involution.ops.standard import FEW, TILE, window_of


def fused_involution2d(
    input: Any,
    reduced: Any,
    weight: Any,
    bias: Any,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str,
) -> Any:
    from onnxscript import opset18 as op

    tensors = (reduced, weight) if bias is None else (reduced, weight, bias)
    kernels = op.Conv(*tensors, kernel_shape=[1, 1])
    groups = weight.shape[0] // (kernel_size[0] * kernel_size[1])
    sides = op.Shape(kernels, start=2)
    kernels = op.Reshape(kernels, _joined(0, groups, *kernel_size, sides))
    sizes = groups, kernel_size
    return _sum_windows(input, kernels, sides, sizes, stride, padding, dilation)


def involution2d(
    input: Any,
    weight: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str,
) -> Any:
    from onnxscript import opset18 as op

    sides = op.Shape(weight, start=4)
    sizes = weight.shape[1], weight.shape[2:4]
    return _sum_windows(input, weight, sides, sizes, stride, padding, dilation)


def _joined(*values: Any) -> Any:
    """One vector of numbers and of vectors in the graph."""
    from onnxscript import opset18 as op

    parts = [op.Constant(value_ints=[v]) if isinstance(v, int) else v for v in values]
    return op.Concat(*parts, axis=0)


def _sum_windows(
    input: Any,
    kernels: Any,
    sides: Any,
    sizes: tuple[int, Sequence[int]],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Any:
    """Of kernels [N, G, K, K, Ho, Wo]; `sides` are the last two, `sizes` G and K, K."""
    from onnxscript import opset18 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    def padded(x: Any, axis: int, before: Any, after: Any) -> Any:
        return op.Pad(x, _joined(before, after), None, ints(axis))

    def cut(x: Any, axis: int, start: Any, end: Any) -> Any:
        return op.Slice(x, start, end, ints(axis))

    def transposed(x: Any, dim: int) -> Any:
        x = op.Transpose(x, perm=[0, 1, 3, 2])
        if channels > FEW:
            return x
        identity = op.EyeLike(op.ConstantOfShape(ints(channels, channels)))
        identity = op.CastLike(identity, input)
        return op.MatMul(x, identity) if dim == 3 else op.MatMul(identity, x)

    groups, (rows, columns) = sizes
    window = window_of(columns, stride[1], dilation[1])
    channels = input.shape[1] // groups
    height, width = cut(sides, 0, ints(0), ints(1)), cut(sides, 0, ints(1), ints(2))
    tiles = op.Div(op.Add(width, ints(TILE - 1)), ints(TILE))

    # Each output's kernel, with zeros between the taps: a row of a matrix.
    kernels = op.Transpose(kernels, perm=[0, 1, 4, 5, 2, 3])
    if dilation[1] > 1:
        kernels = padded(op.Unsqueeze(kernels, ints(6)), 6, 0, dilation[1] - 1)
        kernels = op.Reshape(kernels, ints(0, 0, 0, 0, 0, -1))
        kernels = cut(kernels, 5, ints(0), ints((columns - 1) * dilation[1] + 1))
    kernels = padded(kernels, 5, 0, window - (columns - 1) * dilation[1] - 1)
    kernels = op.Reshape(kernels, ints(0, 0, 0, 0, rows * window))
    kernels = padded(kernels, 4, 0, stride[1])
    kernels = padded(kernels, 3, 0, op.Sub(op.Mul(tiles, ints(TILE)), width))
    pitch = rows * window + stride[1]
    kernels = op.Reshape(kernels, ints(0, 0, -1, TILE * pitch))
    kernels = cut(kernels, 3, ints(0), ints(TILE * rows * window))
    kernels = op.Reshape(kernels, ints(0, 0, 0, TILE, rows * window))

    # Rows of pixels in pieces, as many as the windows of a row reach into.
    images = transposed(op.Reshape(input, ints(0, groups, channels, -1)), 3)
    size = op.Shape(input, start=2)
    images = op.Reshape(images, _joined(0, groups, size, channels))
    images = padded(images, 2, padding[0], padding[0])
    line = op.Mul(op.Sub(tiles, ints(1)), ints(stride[1]))
    line = op.Add(line, ints(window // TILE))
    right = op.Sub(op.Mul(line, ints(TILE)), op.Shape(input, start=3))
    images = padded(images, 3, padding[1], op.Sub(right, ints(padding[1])))
    images = op.Reshape(images, ints(0, groups, -1, TILE * channels))

    zero, one = (op.Constant(value_int=value) for value in (0, 1))

    def steps(count: Any, length: Any, *axes: int) -> Any:
        numbers = op.Range(zero, op.Squeeze(count, ints(0)), one)
        return op.Unsqueeze(op.Mul(numbers, length), ints(*axes))

    places = steps(height, op.Mul(line, ints(stride[0])), 1, 2, 3)
    places = op.Add(places, steps(tiles, ints(stride[1]), 1, 2))
    places = op.Add(places, steps(ints(rows), op.Mul(line, ints(dilation[0])), 1))
    places = op.Add(places, op.Constant(value_ints=range(window // TILE)))
    windows = op.Gather(images, op.Reshape(places, ints(-1)), axis=2)
    shape = _joined(0, 0, op.Mul(height, tiles), rows * window, channels)
    out = op.MatMul(kernels, op.Reshape(windows, shape))
    out = op.Reshape(out, ints(0, 0, -1, channels))
    out = transposed(out, 2)
    sides_of_tiles = _joined(height, op.Mul(tiles, ints(TILE)))
    out = op.Reshape(out, _joined(0, groups * channels, sides_of_tiles))
    return cut(out, 3, ints(0), width)
