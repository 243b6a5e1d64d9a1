"""Triton kernels of involution: the forward pass and the two gradients.

By count of their machine code (docs/benchmarks.md) issuing instructions binds them, not
memory: of about 9,100 for 4 rows of 32 lanes in NCHW and half precision, 3,136 multiply
and add, 3,900 load, clear and widen. Waiting comes next. So what counts is how often
a value is loaded, and how many loads are under way at once. A program works on
one group of channels, or on BLOCK_C of them, and on BLOCK_P lanes. A lane is one column
and ROWS consecutive rows of an image; lanes run along the columns, then along the
blocks of rows, then along the images, so that small images fill a program as well as
large ones. Pixels are held as tiles [BLOCK_C, BLOCK_P], one tile for each row of the
lanes; kernels as vectors [1, BLOCK_P], one for each tap and row.

* Each element of the kernels, by far the largest tensor, is read or written once, along
  its pixels (once for each BLOCK_C channels of larger groups).
* A tile serves all ROWS rows whose windows it is in. For 7x7 kernels at stride 1 and 4
  rows that makes 10 rows of tiles where every row alone reads 7, 28 in all. They come
  out of the L1 cache; of memory a program reads its own pixels and the border of their
  windows once.
* The loads for COLUMNS columns of taps are issued before their values are used, so that
  a program waits once for many. A branch around them, taken in all but narrow images,
  keeps the compiler from moving more loads up than the registers hold. Tiles of a row
  lie at constant distances in NCHW, which instructions hold.
* Tensor cores compute the gradient of kernels in half precision where they can. There
  the units of shared memory and shuffles bind: a result passes through them three
  times until its band is in order.
* Sums are kept in float32 (in float64 for float64), without atomics. They run over the
  taps in one fixed order; over the channels in one that depends on the blocks alone, or
  in that of the tensor cores.

Pixels are [N, C, H, W] in memory or, with CHANNELS_LAST, [N, H, W, C]. Kernels are
[N, G, Kh*Kw, Ho*Wo], contiguous. S is the stride, D the dilation, p the padding. Sizes
of images are run-time arguments that nothing is specialized for, so a new size compiles
nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tuner import tuned

# A thread of a warp holds a lane and all 16 channels. More rows share more tiles; fewer
# leave more programs for small images. Each takes the compiler a while.
BLOCKS = ((4, 32, 1), (2, 32, 1), (1, 32, 1))
CONFIGS = [
    triton.Config(dict(ROWS=rows, BLOCK_P=lanes), num_warps=warps, num_stages=1)
    for rows, lanes, warps in BLOCKS
]


@triton.jit
def _lanes(batch, height, width, BLOCK_P: tl.constexpr, ROWS: tl.constexpr):
    """Image, first row and column of this program's lanes, and their part of the work.

    Parts come first: programs that run at the same time read the same pixels' channels,
    which share lines of the L2 cache in channels_last memory.
    """
    programs = tl.num_programs(0)
    row_blocks = tl.cdiv(height, ROWS)
    parts = programs // tl.cdiv(batch * row_blocks * width, BLOCK_P)
    program = tl.program_id(0)
    lane = program // parts * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    row = lane // width
    image = (row // row_blocks).to(tl.int64)
    return image, row % row_blocks * ROWS, lane % width, program % parts


@triton.jit
def _channels(part, GROUP_CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Group of a part, its channels [BLOCK_C, 1], and which are in the group at all."""
    blocks: tl.constexpr = (GROUP_CHANNELS + BLOCK_C - 1) // BLOCK_C
    group = part // blocks
    in_group = part % blocks * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    return group, group * GROUP_CHANNELS + in_group, in_group < GROUP_CHANNELS


@triton.jit
def _pixels(tensor, image, channel, row, column, shape, CHANNELS_LAST: tl.constexpr):
    """Pointers [BLOCK_C, BLOCK_P] to pixels; `shape` is channels, height, width."""
    channels, height, width = shape
    area = height.to(tl.int64) * width
    pixel = row.to(tl.int64) * width + column
    if CHANNELS_LAST:
        pixel = (image * area + pixel) * channels
    else:
        pixel = image * area * channels + pixel
        # Not true at the ends of rows, but never taken for aligned, as sizes are not
        # specialized: it makes warps run along pixels, and no vectors.
        pixel = tl.max_contiguous(pixel, (1, pixel.shape[1]))
        channel = channel * area
    return tensor + (channel + pixel)


# Columns of taps whose loads are under way at once. Eight would spill.
COLUMNS = tl.constexpr(4)


@tuned(CONFIGS)
def forward(
    input, weight, output, batch, channels, height, width, out_height, out_width,
    pad_height, pad_width, size_class,  # size_class is for the tuner alone
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Y[c, i, j] = sum over u, v of H[u, v, i, j] X[c, i*S + u*D - p, j*S + v*D - p].

    Reads X and H, writes Y. Row t of the lanes' windows, S*r + u*D, is tap u of row r.
    """
    tl.static_assert(ROWS == 1 or DH == 1)
    sum_type: tl.constexpr = (
        tl.float64 if weight.dtype.element_ty == tl.float64 else tl.float32
    )
    every: tl.constexpr = GROUP_CHANNELS % BLOCK_C == 0
    image, row, column, part = _lanes(batch, out_height, out_width, BLOCK_P, ROWS)
    group, channel, in_group = _channels(part, GROUP_CHANNELS, BLOCK_C)
    lanes = image < batch

    y = row * SH - pad_height
    x = column * SW - pad_width
    shape = (channels, height, width)
    pixels = _pixels(input, image, channel, y, x, shape, CHANNELS_LAST)
    step = channels if CHANNELS_LAST else 1
    area = out_height.to(tl.int64) * out_width
    groups = channels // GROUP_CHANNELS
    kernels = weight + (image * groups + group) * (KH * KW) * area
    kernels += row * out_width + column

    sums, starts = (), ()
    for r in tl.static_range(ROWS):
        sums += (tl.zeros((BLOCK_C, BLOCK_P), sum_type),)
        # Row t is equally far from each: no pointer serves two t, to be kept till then.
        starts += (kernels + r * (out_width - SH * KW * area),)
    for t in tl.static_range(0, KH * DH + (ROWS - 1) * SH, DH):
        rows = lanes & (y + t >= 0) & (y + t < height)
        line = pixels + t * width * step
        for first in tl.static_range(0, KW, COLUMNS):
            if first * DW < width + pad_width:
                taps = ()
                for v in tl.static_range(first, first + COLUMNS):
                    if v < KW:
                        inside = rows & (x + v * DW >= 0) & (x + v * DW < width)
                        for r in tl.static_range(ROWS):
                            if t >= r * SH and t - r * SH < KH * DH:
                                real = inside & (row + r < out_height)
                                start = starts[r] + (t // DH * KW + v) * area
                                taps += (tl.load(start, real, 0),)
                            else:
                                taps += (0,)
                for v in tl.static_range(first, first + COLUMNS):
                    if v < KW:
                        inside = rows & (x + v * DW >= 0) & (x + v * DW < width)
                        inside = inside if every else inside & in_group
                        tile = tl.load(line + v * DW * step, inside, 0)
                        tile, new = tile.to(sum_type), ()
                        for r in tl.static_range(ROWS):
                            total = sums[r]
                            if t >= r * SH and t - r * SH < KH * DH:
                                tap = taps[(v - first) * ROWS + r]
                                total += tap.to(sum_type) * tile
                            new += (total,)
                        sums = new

    shape = (channels, out_height, out_width)
    pixels = _pixels(output, image, channel, row, column, shape, CHANNELS_LAST)
    for r in tl.static_range(ROWS):
        real = lanes & (row + r < out_height)
        real = real if every else real & in_group
        result = sums[r].to(output.dtype.element_ty)
        tl.store(pixels + r * out_width * step, result, real)


@triton.jit
def _first_tap(
    position, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, GCD: tl.constexpr
):
    """First tap u for which `position` - u*D is a multiple of S, and which multiple."""
    first = K
    for u in tl.static_range(S // GCD - 1, -1, -1):
        first = tl.where((position - u * D) % S == 0, u, first)
    return first, (position - first * D) // S


@tuned(CONFIGS)
def grad_input(
    grad, weight, output, batch, channels, height, width, out_height, out_width,
    pad_height, pad_width, size_class,  # size_class is for the tuner alone
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, GCD_H: tl.constexpr, GCD_W: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dX[c, y, x] = sum over u, v of H[u, v, i, j] dY[c, i, j], i*S + u*D - p = y.

    Reads dY and H, writes dX. Pixels of one phase, y % S and x % S, are read by the
    same taps: a first one and every (S / gcd(S, D))th after it, each of them
    D / gcd(S, D) rows of dY above the last. So the lanes are pixels of one phase, and
    their rows lie S apart.
    """
    tl.static_assert(ROWS == 1 or DH == 1)
    sum_type: tl.constexpr = (
        tl.float64 if weight.dtype.element_ty == tl.float64 else tl.float32
    )
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
    area = out_height.to(tl.int64) * out_width
    groups = channels // GROUP_CHANNELS
    kernels = weight + (image * groups + group) * (KH * KW) * area
    kernels += i * out_width + j

    up: tl.constexpr = DH // GCD_H
    left: tl.constexpr = DW // GCD_W
    taps_h: tl.constexpr = (KH * GCD_H + SH - 1) // SH
    taps_w: tl.constexpr = (KW * GCD_W + SW - 1) // SW
    sums = ()
    for _ in tl.static_range(ROWS):
        sums += (tl.zeros((BLOCK_C, BLOCK_P), sum_type),)
    next_u: tl.constexpr = SH // GCD_H
    next_v: tl.constexpr = SW // GCD_W
    columns: tl.constexpr = COLUMNS if SW == 1 else 1
    for t in tl.static_range(0, taps_h * up + ROWS - 1, up):
        rows = lanes & (i >= t) & (i - t < out_height)
        line = pixels - t * out_width * step
        for first in tl.static_range(0, taps_w, columns):
            if (first * left < width + pad_width) & (first_v + first * next_v < KW):
                taps = ()
                for k in tl.static_range(first, first + columns):
                    if k < taps_w:
                        inside = rows & (j >= k * left) & (j - k * left < out_width)
                        for r in tl.static_range(ROWS):
                            if t > ROWS - 2 - r and t + r < taps_h * up + ROWS - 1:
                                u = first_u + (t + r + 1 - ROWS) // up * next_u
                                tap = (u * KW + first_v + k * next_v) * area
                                offset = tap - (t * out_width + k * left)
                                real = tl.where(u < KH, inside, False)
                                taps += (tl.load(kernels + offset, real, 0),)
                            else:
                                taps += (0,)
                for k in tl.static_range(first, first + columns):
                    if k < taps_w:
                        inside = rows & (j >= k * left) & (j - k * left < out_width)
                        inside = inside if every else inside & in_group
                        tile = tl.load(line - k * left * step, inside, 0).to(sum_type)
                        new = ()
                        for r in tl.static_range(ROWS):
                            total = sums[r]
                            if t > ROWS - 2 - r and t + r < taps_h * up + ROWS - 1:
                                u = first_u + (t + r + 1 - ROWS) // up * next_u
                                if SH == 1 or u < KH:  # the same for all lanes
                                    value = taps[(k - first) * ROWS + r]
                                    total += value.to(sum_type) * tile
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


@tuned(CONFIGS)
def grad_weight(
    grad, input, output, batch, channels, height, width, out_height, out_width,
    pad_height, pad_width, size_class,  # size_class is for the tuner alone
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dH[u, v, i, j] = sum over c of dY[c, i, j] X[c, i*S + u*D - p, j*S + v*D - p].

    Reads dY and X, writes dH. Rows share tiles of X as in the forward pass; tiles of dY
    stay in registers if BLOCK_C holds the group, else they come out of the cache.
    """
    tl.static_assert(ROWS == 1 or DH == 1)
    sum_type: tl.constexpr = (
        tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    )
    # Products of pieces are added up before their channels are: fused multiply-adds.
    PIECE: tl.constexpr = 4 if BLOCK_C > 4 else BLOCK_C
    every: tl.constexpr = GROUP_CHANNELS % BLOCK_C == 0
    blocks: tl.constexpr = (GROUP_CHANNELS + BLOCK_C - 1) // BLOCK_C
    image, row, column, group = _lanes(batch, out_height, out_width, BLOCK_P, ROWS)
    lanes = image < batch
    in_group = tl.arange(0, PIECE)[:, None]
    channel = group * GROUP_CHANNELS + in_group
    area = out_height.to(tl.int64) * out_width
    plane = image * (channels // GROUP_CHANNELS) + group
    kernels = output + (plane * (KH * KW) * area + row * out_width + column)

    y = row * SH - pad_height
    x = column * SW - pad_width
    shape = (channels, height, width)
    pixels = _pixels(input, image, channel, y, x, shape, CHANNELS_LAST)
    step = channels if CHANNELS_LAST else 1
    next_channel = 1 if CHANNELS_LAST else height.to(tl.int64) * width
    shape = (channels, out_height, out_width)
    grads = _pixels(grad, image, channel, row, column, shape, CHANNELS_LAST)
    next_grad = 1 if CHANNELS_LAST else area

    held, lines = (), ()
    for r in tl.static_range(ROWS):
        for c in tl.static_range(0, BLOCK_C, PIECE):
            if blocks == 1:
                real = lanes & (row + r < out_height)
                real = real if every else real & (in_group + c < GROUP_CHANNELS)
                piece = grads + (r * out_width * step + c * next_grad)
                held += (tl.load(piece, real, 0).to(sum_type),)
    for c in tl.static_range(0, BLOCK_C, PIECE):
        lines += (pixels + c * next_channel,)
    for t in tl.static_range(0, KH * DH + (ROWS - 1) * SH, DH):
        rows = lanes & (y + t >= 0) & (y + t < height)
        for first in tl.static_range(0, KW, COLUMNS):
            sums = ()
            for _ in tl.static_range(COLUMNS * ROWS):
                sums += (tl.zeros((PIECE, BLOCK_P), sum_type),)
            if first * DW < width + pad_width:
                for b in range(blocks):
                    new = ()
                    for v in tl.static_range(first, first + COLUMNS):
                        inside = rows & (x + v * DW >= 0) & (x + v * DW < width)
                        tiles = ()
                        for c in tl.static_range(0, BLOCK_C, PIECE):
                            in_block = in_group + (b * BLOCK_C + c) < GROUP_CHANNELS
                            loaded = inside if every else inside & in_block
                            piece = lines[c // PIECE] + b * BLOCK_C * next_channel
                            if v < KW:
                                tile = tl.load(piece + v * DW * step, loaded, 0)
                                tiles += (tile.to(sum_type),)
                        for r in tl.static_range(ROWS):
                            total = sums[(v - first) * ROWS + r]
                            if v < KW and t >= r * SH and t - r * SH < KH * DH:
                                for c in tl.static_range(0, BLOCK_C, PIECE):
                                    if blocks == 1:
                                        g = held[(r * BLOCK_C + c) // PIECE]
                                    else:
                                        in_block = in_group + (b * BLOCK_C + c)
                                        in_block = in_block < GROUP_CHANNELS
                                        wanted = lanes & (row + r < out_height)
                                        wanted = wanted if every else wanted & in_block
                                        offset = (b * BLOCK_C + c) * next_grad
                                        offset += r * out_width * step
                                        g = tl.load(grads + offset, wanted, 0)
                                        g = g.to(sum_type)
                                    total += g * tiles[c // PIECE]
                            new += (total,)
                    sums = new
            for v in tl.static_range(first, first + COLUMNS):
                inside = rows & (x + v * DW >= 0) & (x + v * DW < width)
                for r in tl.static_range(ROWS):
                    if v < KW and t >= r * SH and t - r * SH < KH * DH:
                        tap = (t - r * SH) // DH * KW + v
                        stored = lanes & (row + r < out_height)
                        result = tl.sum(sums[(v - first) * ROWS + r], 0, True)
                        result = tl.where(inside, result, 0)
                        result = result.to(output.dtype.element_ty)
                        tl.store(kernels + (tap * area + r * out_width), result, stored)
        below = ()
        for c in tl.static_range(0, BLOCK_C, PIECE):
            below += (lines[c // PIECE] + width * DH * step,)
        lines = below


# Pixels of dY in a run, the taps of each, and the pixels of X that their windows meet.
RUN, TAPS, WINDOW = tl.constexpr(8), tl.constexpr(8), tl.constexpr(16)


@tuned(CONFIGS)
def grad_weight_banded(
    grad, input, output, batch, channels, height, width, out_height, out_width,
    pad_height, pad_width, size_class,  # size_class is for the tuner alone
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What :func:`grad_weight` computes, by tensor cores: in half precision, S = D = 1.

    The products of all pixels of a run of dY with all pixels of X that their windows
    meet in one row are a small matrix. Of it the result is a band: tap v of pixel i is
    in line i + v of column i. A gather along the lines moves it to line v; two runs go
    through that together, as halves of 32 bits. Programs share the work as elsewhere,
    but number runs where others number pixels.
    """
    tl.static_assert(SH * SW * DH * DW == 1 and KW <= TAPS)
    RUNS: tl.constexpr = BLOCK_P // RUN
    image, row, run, group = _lanes(
        batch, out_height, tl.cdiv(out_width, RUN), RUNS, ROWS
    )
    image = tl.reshape(image, (RUNS, 1, 1))
    row = tl.reshape(row, (RUNS, 1, 1))
    first = tl.reshape(run, (RUNS, 1, 1)) * RUN
    step = channels if CHANNELS_LAST else 1
    area = height.to(tl.int64) * width
    out_area = out_height.to(tl.int64) * out_width
    groups = channels // GROUP_CHANNELS

    # Tiles of X are [RUNS, WINDOW, BLOCK_C], of dY [RUNS, BLOCK_C, RUN].
    channel = tl.arange(0, BLOCK_C)[None, None, :]
    in_group = channel < GROUP_CHANNELS
    channel = (group * GROUP_CHANNELS + channel) * (1 if CHANNELS_LAST else area)
    y = row - pad_height
    x = first + tl.arange(0, WINDOW)[None, :, None] - pad_width
    columns = (image < batch) & (x >= 0) & (x < width)
    pixels = image * channels * area + (y.to(tl.int64) * width + x) * step
    pixels = input + (pixels + channel)

    channel = tl.arange(0, BLOCK_C)[None, :, None]
    out_in_group = channel < GROUP_CHANNELS
    channel = (group * GROUP_CHANNELS + channel) * (1 if CHANNELS_LAST else out_area)
    column = first + tl.arange(0, RUN)[None, None, :]
    real = (image < batch) & (column < out_width)
    pixel = row.to(tl.int64) * out_width + column
    grads = grad + (image * channels * out_area + pixel * step + channel)
    held = ()
    for r in tl.static_range(ROWS):
        wanted = real & out_in_group & (row + r < out_height)
        held += (tl.load(grads + r * out_width * step, wanted, 0),)

    # Tiles of the result are [TAPS, RUNS, RUN], so that warps write along pixels.
    tap = tl.arange(0, TAPS)[:, None, None]
    pixel += (image * groups + group) * (KH * KW) * out_area
    kernels = output + (tl.reshape(pixel, (1, RUNS, RUN)) + tap * out_area)
    stored = tl.reshape(real, (1, RUNS, RUN)) & (tap < KW)
    rows_left = out_height - tl.reshape(row, (1, RUNS, 1))
    line = tl.arange(0, TAPS)[None, :, None] + tl.arange(0, RUN)[None, None, :]
    line = tl.broadcast_to(line, (RUNS // 2, TAPS, RUN))
    for t in tl.static_range(KH + ROWS - 1):
        inside = columns & (y + t >= 0) & (y + t < height)
        tile = tl.load(pixels + t * width * step, inside & in_group, 0)
        for r in tl.static_range(ROWS):
            if t >= r and t - r < KH:
                # Not zero where X is: the gradient may be infinite.
                band = tl.where(inside, tl.dot(tile, held[r]), 0)
                band = band.to(output.dtype.element_ty)
                bits = band.to(tl.uint16, bitcast=True).to(tl.uint32)
                bits = tl.reshape(bits, (2, RUNS // 2, WINDOW, RUN))
                low, high = tl.split(tl.permute(bits, (1, 2, 3, 0)))
                bits = tl.gather(low | (high << 16), line, 1)
                bits = tl.join(bits & 0xFFFF, bits >> 16).to(tl.uint16)
                bits = tl.reshape(tl.permute(bits, (1, 3, 0, 2)), (TAPS, RUNS, RUN))
                band = bits.to(output.dtype.element_ty, bitcast=True)
                place = kernels + ((t - r) * KW * out_area + r * out_width)
                tl.store(place, band, stored & (r < rows_left))
