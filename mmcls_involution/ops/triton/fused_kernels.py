"""Triton kernel of the fused operator: kernels are generated where they are used.

A program works on one group, on BLOCK_C of its channels, and on lanes as those of
kernels.py. For each of their rows the tensor cores multiply the reduced map of the
lanes [BLOCK_P, R] by the span weights of the group [R, taps]. The product, a lane's
kernel, is then split in halves, and halves of halves, until each tap is a vector
[1, BLOCK_P] of its own: it never leaves the registers. After that the tiles of the
input go by as in the forward pass of kernels.py, each serving all rows whose windows it
is in.

Read are the input, the weights, and by each group the reduced map; written is the
output. For RedNet's first stage that is 48 values for each pixel and group (36 of
memory where the groups share the reduced map in the L2 cache), where two steps write
and read 49 kernel values on top.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import _channels, _lanes, _pixels, tuned

CONFIGS = [
    triton.Config(dict(ROWS=rows, BLOCK_P=lanes), num_warps=warps, num_stages=1)
    for rows, lanes, warps in ((1, 64, 4), (2, 64, 4), (1, 32, 1), (2, 16, 1))
]


@triton.jit
def _reversed_bits(i, BITS: tl.constexpr):
    """The order in which halving in pairs gives out what lies side by side."""
    result = i * 0
    for bit in tl.static_range(BITS):
        result |= (i >> bit & 1) << (BITS - 1 - bit)
    return result


@triton.jit
def _columns(x, BLOCK_P: tl.constexpr, BITS: tl.constexpr):
    """The 2**BITS columns of x [BLOCK_P, 2**BITS], bits of their numbers reversed."""
    parts = (x,)
    for level in tl.static_range(BITS):
        halves = ()
        for i in tl.static_range(1 << level):
            pairs = tl.reshape(parts[i], (BLOCK_P, 1 << (BITS - 1 - level), 2))
            even, odd = tl.split(pairs)
            halves += (even, odd)
        parts = halves
    columns = ()
    for i in tl.static_range(1 << BITS):
        columns += (tl.reshape(parts[i], (1, BLOCK_P)),)
    return columns


@tuned(CONFIGS)
def fused_forward(
    input,
    reduced,
    weight,
    bias,
    output,
    batch,
    channels,
    reduced_channels,
    height,
    width,
    out_height,
    out_width,
    pad_height,
    pad_width,
    size_class,  # for the tuner alone
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Y[c, i, j] = sum over u, v of H[u, v, i, j] X[c, i*S + u*D - p, j*S + v*D - p],
    H[u, v, i, j] = b[u, v] + sum over r of w[u, v, r] Z[r, i, j].

    Reads X, Z, w and b, writes Y.
    """
    tl.static_assert(ROWS == 1 or DH == 1)
    every: tl.constexpr = GROUP_CHANNELS % BLOCK_C == 0
    image, row, column, part = _lanes(batch, out_height, out_width, BLOCK_P, ROWS)
    group, channel, in_group = _channels(part, GROUP_CHANNELS, BLOCK_C)
    lanes = image < batch
    y = row * SH - pad_height
    x = column * SW - pad_width
    shape = (channels, height, width)
    pixels = _pixels(input, image, channel, y, x, shape, CHANNELS_LAST)
    step = channels if CHANNELS_LAST else 1

    tap = _reversed_bits(tl.arange(0, 1 << BITS)[None, :], BITS)
    real_tap = tap < KH * KW
    first = weight + group.to(tl.int64) * (KH * KW) * reduced_channels
    b = tl.load(bias + group * (KH * KW) + tap, real_tap, 0).to(tl.float32)
    shape = (reduced_channels, out_height, out_width)
    kernels = ()
    for r in tl.static_range(ROWS):
        wanted = lanes & (row + r < out_height)
        kernel = tl.zeros((BLOCK_P, 1 << BITS), tl.float32)
        for start in range(0, reduced_channels, BLOCK_R):
            z = start + tl.arange(0, BLOCK_R)
            source = _pixels(
                reduced, image, z[:, None], row + r, column, shape, CHANNELS_LAST
            )
            loaded = wanted & (z[:, None] < reduced_channels)
            source = tl.load(source, loaded, 0)
            spans = tl.load(
                first + tap * reduced_channels + z[:, None],
                real_tap & (z[:, None] < reduced_channels),
                0,
            )
            kernel = tl.dot(tl.trans(source), spans, kernel, input_precision='ieee')
        kernels += _columns(kernel + b, BLOCK_P, BITS)

    sums = ()
    for _ in tl.static_range(ROWS):
        sums += (tl.zeros((BLOCK_C, BLOCK_P), tl.float32),)
    for t in tl.static_range(0, KH * DH + (ROWS - 1) * SH, DH):
        rows = lanes & (y + t >= 0) & (y + t < height)
        for v in tl.static_range(KW):
            inside = rows & (x + v * DW >= 0) & (x + v * DW < width)
            inside = inside if every else inside & in_group
            tile = tl.load(pixels + (t * width + v * DW) * step, inside, 0)
            tile = tile.to(tl.float32)
            new = ()
            for r in tl.static_range(ROWS):
                total = sums[r]
                if t >= r * SH and t - r * SH < KH * DH:
                    total += kernels[(r << BITS) + (t - r * SH) // DH * KW + v] * tile
                new += (total,)
            sums = new

    shape = (channels, out_height, out_width)
    pixels = _pixels(output, image, channel, row, column, shape, CHANNELS_LAST)
    for r in tl.static_range(ROWS):
        wanted = lanes & (row + r < out_height)
        wanted = wanted if every else wanted & in_group
        result = sums[r].to(output.dtype.element_ty)
        tl.store(pixels + r * out_width * step, result, wanted)
