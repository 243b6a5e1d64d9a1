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

from .kernels import (
    _channels,
    _first_tap,
    _lane_blocks,
    _lanes,
    _lanes_of,
    _pixels,
    _sum_channels,
    tuned,
)

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
    input, reduced, weight, bias, output,
    batch, channels, reduced_channels, height, width, out_height, out_width,
    pad_height, pad_width, size_class,  # size_class is for the tuner alone
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BITS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
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
            loaded = inside if every else inside & in_group
            tile = tl.load(pixels + (t * width + v * DW) * step, loaded, 0)
            tile = tile.to(tl.float32)
            new = ()
            for r in tl.static_range(ROWS):
                total = sums[r]
                if t >= r * SH and t - r * SH < KH * DH:
                    kernel = kernels[(r << BITS) + (t - r * SH) // DH * KW + v]
                    total += tl.where(inside, kernel, 0) * tile
                new += (total,)
            sums = new

    shape = (channels, out_height, out_width)
    pixels = _pixels(output, image, channel, row, column, shape, CHANNELS_LAST)
    for r in tl.static_range(ROWS):
        wanted = lanes & (row + r < out_height)
        wanted = wanted if every else wanted & in_group
        result = sums[r].to(output.dtype.element_ty)
        tl.store(pixels + r * out_width * step, result, wanted)


GENERATOR_CONFIGS = [
    triton.Config(dict(ROWS=rows, BLOCK_P=lanes), num_warps=warps, num_stages=1)
    for rows, lanes, warps in ((4, 64, 4), (2, 128, 4), (2, 64, 2), (1, 64, 2))
]
MOST_LANES = max(c.kwargs['ROWS'] * c.kwargs['BLOCK_P'] for c in GENERATOR_CONFIGS)


@tuned(GENERATOR_CONFIGS)
def fused_grad_generator(
    grad, input, reduced, weight, scratch, grad_reduced, grad_weight, grad_bias,
    batch, channels, reduced_channels, height, width, out_height, out_width,
    pad_height, pad_width, size_class,  # size_class is for the tuner alone
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BITS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dH[u, v, i, j] = sum over c of dY[c, i, j] X[c, i*S + u*D - p, j*S + v*D - p],
    dZ = w^T dH, dw = dH Z^T, db = sum of dH over the pixels.

    Reads dY, X, Z and w, writes dZ in float32, and the part of dw and db of each
    program. A program takes some blocks of lanes through all groups: the elements of dZ
    that it adds to are its own. dH of a block passes through `scratch`, which is so
    small that it stays in the cache; tensor cores read it from there.
    """
    lanes_at_once: tl.constexpr = 16
    chunks: tl.constexpr = BLOCK_P // lanes_at_once
    blocks = _lane_blocks(batch, out_height, out_width, BLOCK_P, ROWS)
    program = tl.program_id(0).to(tl.int64)
    first_block = (program * blocks // tl.num_programs(0)).to(tl.int32)
    last_block = ((program + 1) * blocks // tl.num_programs(0)).to(tl.int32)
    groups = channels // GROUP_CHANNELS
    kernels = scratch + program * (KH * KW * ROWS * BLOCK_P)
    tap = tl.arange(0, 1 << BITS)
    real_tap = tap < KH * KW
    z = tl.arange(0, BLOCK_R)[:, None]
    real_z = z < reduced_channels
    shape = (reduced_channels, out_height, out_width)
    for group in range(groups):
        first = (group * (KH * KW) + tap).to(tl.int64)
        spans = tl.load(
            weight + first * reduced_channels + z, real_tap[None, :] & real_z, 0
        )
        weight_sum = tl.zeros((1 << BITS, BLOCK_R), tl.float32)
        bias_sum = tl.zeros((1 << BITS,), tl.float32)
        for block in range(first_block, last_block):
            image, row, column = _lanes_of(block, out_height, out_width, BLOCK_P, ROWS)
            tl.debug_barrier()  # the block before has been read
            _sum_channels(
                *(grad, input, kernels + tl.arange(0, BLOCK_P)[None, :]),
                *(ROWS * BLOCK_P, BLOCK_P, image, row, column, group, image < batch),
                *(channels, height, width, out_height, out_width),
                *(pad_height, pad_width, KH, KW, SH, SW, DH, DW),
                *(GROUP_CHANNELS, CHANNELS_LAST, BLOCK_C, BLOCK_P, ROWS),
            )
            tl.debug_barrier()  # all of it has been written
            for chunk in range(chunks):
                n, i, j = _lanes_of(
                    block * chunks + chunk, out_height, out_width, lanes_at_once, ROWS
                )
                lane = chunk * lanes_at_once + tl.arange(0, lanes_at_once)[None, :]
                for r in range(ROWS):
                    real = (n < batch) & (i + r < out_height)
                    kernel = tl.load(
                        kernels + (tap[:, None] * ROWS + r) * BLOCK_P + lane,
                        real & real_tap[:, None],
                        0,
                    )
                    bias_sum += tl.sum(kernel.to(tl.float32), axis=1)
                    pixels = _pixels(reduced, n, z, i + r, j, shape, CHANNELS_LAST)
                    source = tl.load(pixels, real & real_z, 0)
                    weight_sum = tl.dot(
                        kernel, tl.trans(source), weight_sum, input_precision='ieee'
                    )
                    result = tl.dot(spans, kernel, input_precision='ieee')
                    pixels = _pixels(grad_reduced, n, z, i + r, j, shape, CHANNELS_LAST)
                    if group > 0:
                        result += tl.load(pixels, real & real_z, 0)
                    tl.store(pixels, result, real & real_z)

        first += program * groups * (KH * KW)
        tl.store(grad_bias + first, bias_sum, real_tap)
        first = first[:, None] * reduced_channels
        real = real_tap[:, None] & tl.trans(real_z)
        tl.store(grad_weight + first + tl.trans(z), weight_sum, real)


@tuned(CONFIGS)
def fused_grad_input(
    grad, reduced, weight, bias, output,
    batch, channels, reduced_channels, height, width, out_height, out_width,
    pad_height, pad_width, size_class,  # size_class is for the tuner alone
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, GCD_H: tl.constexpr, GCD_W: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BITS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dX[c, y, x] = sum over u, v of H[u, v, i, j] dY[c, i, j], i*S + u*D - p = y,
    H[u, v, i, j] = b[u, v] + sum over r of w[u, v, r] Z[r, i, j].

    Reads dY, Z, w and b, writes dX. A pixel takes one tap of each of the kernels around
    it, so no two lanes want the same row of w at one place of Z: the sums over r are
    not a product of matrices. Phases as in grad_input of kernels.py.
    """
    tl.static_assert(ROWS == 1 or DH == 1)
    every: tl.constexpr = GROUP_CHANNELS % BLOCK_C == 0
    image, row, column, part = _lanes(
        batch, tl.cdiv(height, SH), tl.cdiv(width, SW), BLOCK_P, ROWS
    )
    phase_y = part % (SH * SW) // SW
    phase_x = part % SW
    group, channel, in_group = _channels(part // (SH * SW), GROUP_CHANNELS, BLOCK_C)
    lanes = image < batch

    first_u, i = _first_tap(phase_y + pad_height, KH, SH, DH, GCD_H)
    first_v, j = _first_tap(phase_x + pad_width, KW, SW, DW, GCD_W)
    i += row + ROWS - 1
    j += column
    shape = (channels, out_height, out_width)
    pixels = _pixels(grad, image, channel, i, j, shape, CHANNELS_LAST)
    step = channels if CHANNELS_LAST else 1
    z = tl.arange(0, BLOCK_R)[:, None]
    real_z = z < reduced_channels
    shape = (reduced_channels, out_height, out_width)
    sources = _pixels(reduced, image, z, i, j, shape, CHANNELS_LAST)
    source_step = reduced_channels if CHANNELS_LAST else 1
    first = group * (KH * KW)
    spans = weight + first.to(tl.int64) * reduced_channels + z

    up: tl.constexpr = DH // GCD_H
    left: tl.constexpr = DW // GCD_W
    taps_h: tl.constexpr = (KH * GCD_H + SH - 1) // SH
    taps_w: tl.constexpr = (KW * GCD_W + SW - 1) // SW
    sums = ()
    for _ in tl.static_range(ROWS):
        sums += (tl.zeros((BLOCK_C, BLOCK_P), tl.float32),)
    for t in tl.static_range(0, taps_h * up + ROWS - 1, up):
        rows = lanes & (i >= t) & (i - t < out_height)
        for k in range(taps_w):
            v = first_v + k * (SW // GCD_W)
            if SW == 1 or v < KW:  # the same for all lanes
                inside = rows & (j >= k * left) & (j - k * left < out_width)
                offset = t * out_width + k * left
                loaded = inside if every else inside & in_group
                tile = tl.load(pixels - offset * step, loaded, 0).to(tl.float32)
                source = tl.load(sources - offset * source_step, inside & real_z, 0)
                source = source.to(tl.float32)
                new = ()
                for r in tl.static_range(ROWS):
                    total = sums[r]
                    above = t - (ROWS - 1 - r)
                    if above >= 0 and above < taps_h * up:
                        u = first_u + above // up * (SH // GCD_H)
                        if SH == 1 or u < KH:
                            tap = u * KW + v
                            span = tl.load(spans + tap * reduced_channels, real_z, 0)
                            span = span.to(tl.float32)
                            kernel = tl.sum(span * source, 0, keep_dims=True)
                            kernel += tl.load(bias + first + tap).to(tl.float32)
                            total += tl.where(inside, kernel, 0) * tile
                    new += (total,)
                sums = new

    y = row * SH + phase_y
    x = column * SW + phase_x
    shape = (channels, height, width)
    pixels = _pixels(output, image, channel, y, x, shape, CHANNELS_LAST)
    for r in tl.static_range(ROWS):
        real = lanes & (x < width) & (y + r * SH < height)
        real = real if every else real & in_group
        result = sums[r].to(output.dtype.element_ty)
        tl.store(pixels + r * SH * width * step, result, real)
