// The kernels, compiled once per instruction set: the including file defines ISA (a
// namespace) and BYTES (the width of its vectors).
//
// All operations run over tiles of one image and group. What a tile reads is copied into
// scratch memory that the cache holds, zero-padded and converted to the accumulation type;
// kernels are copied there as well, or generated. There every tap lies at a fixed offset,
// whatever stride, padding and dilation are: the inner loops have neither bounds nor
// gathers, and a copy, unlike sums, reads memory at its full speed.
//
// Where pixels are summed (forward, grad_input) the scratch is [pixels][channels], whatever
// the memory outside is, and a vector runs along the channels of a group: no image is too
// narrow for it. Where channels are summed (grad_weight) a vector runs along the columns.
//
// No function of the standard library may end up in the object file: the linker would
// merge it with the copy that was compiled for another instruction set.

#include <cstdint>
#include <type_traits>

#include "involution.h"
#include "scratch.h"
#include "vectors.h"

namespace ISA {

// ---- inner loops

// Pixels that are summed at once, so that sums do not wait for each other: of the two
// numbers the one that divides a row better. 14 divides the feature maps of 224 pixels.
constexpr int kPixels = 8, kMorePixels = 14;

// Pixels whose kernels are held at once, in the nearest caches, and the distance of their
// taps. As a constant it is part of the instructions; compilers kept the places of 56
// kernels in memory otherwise. See `spread`.
constexpr int64_t kHeldPixels = 256, kTapStride = kHeldPixels + 16;

// Stores sums, and adds zeros to `zeros`, or NaN where a sum is not finite.
template <int N, int P, class A>
__attribute__((always_inline))
inline void store_sums(const Vector<A, N> (&sum)[P], A *out, int64_t out_stride, A *zeros) {
  Vector<A, N> added = load<N>(zeros);
  unroll<P>([&](auto i) {
    store<N>(out + i() * out_stride, sum[i()]);
    added += sum[i()] * A(0);
  });
  store<N>(zeros, added);
}

// out[pixel][0:N] = sum over t of kernels[t][pixel] * source[pixel * step + offset[t] + 0:N]
template <int N, int P, class A>
inline void sum_taps(const A *source, int64_t step, const int64_t *offset, int64_t taps,
                     const A *kernels, A *out, int64_t out_stride, A *zeros) {
  Vector<A, N> sum[P] = {};
  for (int64_t t = 0; t < taps; ++t, kernels += kTapStride)
    for (int i = 0; i < P; ++i)
      sum[i] += kernels[i] * load<N>(source + i * step + offset[t]);
  store_sums<N>(sum, out, out_stride, zeros);
}

// The same for rows of K taps side by side and pixels S apart: each source is loaded once
// for all the pixels that read it.
template <int N, int P, int K, int S, class A>
inline void sum_rows_of_taps(const A *source, int64_t channels, const int64_t *offset,
                             int64_t taps, const A *kernels, A *out, int64_t out_stride,
                             A *zeros) {
  Vector<A, N> sum[P] = {};
  for (int64_t t = 0; t < taps; t += K, kernels += K * kTapStride)
    unroll<(P - 1) * S + K>([&](auto column) {
      const Vector<A, N> x = load_once<N>(source + offset[t] + column() * channels);
      unroll<P>([&](auto i) {
        constexpr int v = column() - i() * S;
        if constexpr (v >= 0 && v < K) sum[i()] += kernels[v * kTapStride + i()] * x;
      });
    });
  store_sums<N>(sum, out, out_stride, zeros);
}

// sum[t][0:N] (+)= sum over c of grad[c][0:N] * source[c][offset[t] + 0:N]
template <int N, int C, class A>
inline void sum_channels(const A *source, int64_t source_stride, const A *grad,
                         int64_t grad_stride, const int64_t *offset, int64_t taps, A *sum,
                         bool first) {
  Vector<A, N> g[C];
  for (int c = 0; c < C; ++c) g[c] = load<N>(grad + c * grad_stride);
  for (int64_t t = 0; t < taps; ++t) {
    // Two sums, for the latency of an addition is several of them.
    Vector<A, N> even = {}, odd = {};
    if (!first) even = load<N>(sum + t * N);
    const A *from = source + offset[t];
    for (int c = 0; c < C; ++c)
      (c % 2 ? odd : even) += g[c] * load<N>(from + c * source_stride);
    store<N>(sum + t * N, Vector<A, N>(even + odd));
  }
}

// out[t][0:P*N] = bias[t] + sum over r of span[t][r] * reduced[r][0:P*N], for T taps
template <int N, int T, int P, class A>
inline void span_kernels(const A *span, const A *bias, int64_t channels, const A *reduced,
                         int64_t reduced_stride, A *out, int64_t out_stride) {
  Vector<A, N> sum[T][P];
  for (int t = 0; t < T; ++t)
    for (int i = 0; i < P; ++i) sum[t][i] = Vector<A, N>{} + bias[t];
  for (int64_t r = 0; r < channels; ++r) {
    Vector<A, N> x[P];
    for (int i = 0; i < P; ++i) x[i] = load<N>(reduced + r * reduced_stride + i * N);
    for (int t = 0; t < T; ++t)
      for (int i = 0; i < P; ++i) sum[t][i] += span[t * channels + r] * x[i];
  }
  for (int t = 0; t < T; ++t)
    for (int i = 0; i < P; ++i) store<N>(out + t * out_stride + i * N, sum[t][i]);
}

// ---- scratch memory, one per thread

template <class A> struct Scratch {
  PixelWindow<A> window;
  PlanarWindow<A> planes;
  Buffer<A> kernels, out, grad, sum, reduced, bias, converted_span;
  Buffer<int64_t> offset;
  A zeros[kLanes<A>] = {};  // NaN once a sum over taps was not finite
  const A *span;  // the part of the span convolution that belongs to a group
  int64_t reduced_pixels = -1;  // the tile whose reduced map is in `reduced`
};

template <class T> struct Tensors {
  const T *first, *second, *span, *bias;
  T *out;
};

// ---- tiles

// A part of the pixels of one image and group. Groups come first: the tiles of the same
// pixels follow each other.
struct Tile {
  static constexpr int64_t kRows = 32, kColumns = 128;
  int64_t pixels, image, group, row, row_end, column, column_end;

  // Of about equal tiles that cover `size`.
  static int64_t side(int64_t size, int64_t largest) {
    return ceil_div(size, ceil_div(size, largest));
  }

  static int64_t count(const Problem &p, const int64_t *size) {
    return p.batch * p.groups * ceil_div(size[0], kRows) * ceil_div(size[1], kColumns);
  }

  Tile(int64_t index, const Problem &p, const int64_t *size) {
    const int64_t across = ceil_div(size[1], kColumns), down = ceil_div(size[0], kRows);
    const int64_t height = side(size[0], kRows), width = side(size[1], kColumns);
    pixels = index / p.groups;
    group = index % p.groups;
    column = pixels % across * width;
    row = pixels / across % down * height;
    image = pixels / across / down;
    row_end = min(row + height, size[0]);
    column_end = min(column + width, size[1]);
  }

  int64_t rows() const { return row_end - row; }
  int64_t columns() const { return column_end - column; }

  // The input that its outputs read, of at least `columns` columns of outputs.
  Area input(const Problem &p, int64_t columns) const {
    return {row * p.stride[0] - p.padding[0],
            (rows() - 1) * p.stride[0] + (p.kernel[0] - 1) * p.dilation[0] + 1,
            column * p.stride[1] - p.padding[1],
            (max(columns, this->columns()) - 1) * p.stride[1] +
                (p.kernel[1] - 1) * p.dilation[1] + 1};
  }
};

// Where the first of the tile's channels begins in an image of that size.
template <class T>
T *channels_of(const Tile &tile, const Problem &p, const int64_t *size, T *images) {
  const int64_t pixels = size[0] * size[1], first = tile.group * (p.channels / p.groups);
  return images + tile.image * p.channels * pixels + first * (p.channels_last ? 1 : pixels);
}

int64_t tile_count(Operation operation, const Problem &p) {
  return Tile::count(p, operation == kGradInput ? p.input : p.output);
}

// Sums over taps at s.offset, for `rows` x `columns` pixels that are `row_step` and
// `column_step` apart in the window from `source` on: out[pixel][channel] from
// s.kernels[tap][kTapStride pixels]. The window has kPixels columns or more. Where there are
// fewer columns or channels than vectors have, `out` is written beyond its end.
template <class A>
void sum_pixels(const A *source, int64_t rows, int64_t columns, int64_t row_step,
                int64_t column_step, int64_t row_of_taps, int64_t taps, int64_t channels,
                Scratch<A> &s, A *out, int64_t out_row, int64_t out_column) {
  constexpr int N = kLanes<A>;
  const int64_t *offset = s.offset.data;
  // By rows of k taps, of 0 tap by tap.
  const auto sum = [&](auto pixels, auto k, auto step) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; j += pixels()) {
        // The last pixels are moved left, or reach beyond the row: what they overwrite
        // there is written after them.
        const int64_t column = max(min(j, columns - pixels()), 0);
        const A *from = source + i * row_step + column * column_step;
        const A *kernels = s.kernels.data + i * columns + column;
        A *to = out + i * out_row + column * out_column;
        for_vectors<A>(channels, [&](int64_t c, auto n, int64_t) {
          if constexpr (n() == N && k() > 0)
            sum_rows_of_taps<N, pixels(), k(), step()>(from + c, channels, offset, taps,
                                                       kernels, to + c, out_column, s.zeros);
          else
            sum_taps<n(), pixels()>(from + c, column_step, offset, taps, kernels, to + c,
                                    out_column, s.zeros);
        });
      }
  };
  const auto sum_all = [&](auto pixels) {
    const int64_t step = column_step / channels;
    if (row_of_taps == 3 && step == 1) sum(pixels, Constant<3>{}, Constant<1>{});
    else if (row_of_taps == 7 && step == 1) sum(pixels, Constant<7>{}, Constant<1>{});
    else if (row_of_taps == 7 && step == 2) sum(pixels, Constant<7>{}, Constant<2>{});
    else sum(pixels, Constant<0>{}, Constant<0>{});
  };
  const auto computed = [&](int64_t pixels) { return ceil_div(columns, pixels) * pixels; };
  if (columns >= kMorePixels && computed(kMorePixels) <= computed(kPixels))
    sum_all(Constant<kMorePixels>{});
  else sum_all(Constant<kPixels>{});
}

// Rows of a tile whose kernels are held at once. A power of two: where it can be, the first
// pixel of each is aligned.
inline int64_t rows_at_once(int64_t columns) {
  int64_t rows = 1;
  while (rows * 2 * columns <= kHeldPixels) rows *= 2;
  return rows;
}

// Reads the kernels of `rows` rows of a tile from `row` on, as [taps][kTapStride] pixels.
template <class A, class T>
void read_kernels(const Problem &p, const Tile &tile, const T *weight, int64_t row,
                  int64_t rows, A *to) {
  const int64_t taps = p.kernel[0] * p.kernel[1], plane = p.output[0] * p.output[1];
  const int64_t at = row * p.output[1] + tile.column, columns = tile.columns();
  if (p.channels_last) {
    weight += ((tile.image * plane + at) * p.groups + tile.group) * taps;
    for (int64_t i = 0; i < rows; ++i, weight += p.output[1] * p.groups * taps)
      transpose<A>(weight, columns, taps, p.groups * taps, to + i * columns, kTapStride);
    return;
  }
  weight += (tile.image * p.groups + tile.group) * taps * plane + at;
  for (int64_t t = 0; t < taps; ++t, weight += plane, to += kTapStride) {
    if (columns == p.output[1]) copy<A>(weight, rows * columns, to);
    else
      for (int64_t i = 0; i < rows; ++i)
        copy<A>(weight + i * p.output[1], columns, to + i * columns);
  }
}

// Reads what the kernels of a tile are generated from: its reduced map as
// [channels][stride] pixels, unless it is there from the group before, and the part of the
// span convolution that belongs to its group.
template <class A, class T>
bool read_generator(const Problem &p, const Tile &tile, const Tensors<T> &t, int64_t stride,
                    Scratch<A> &s) {
  const int64_t taps = p.kernel[0] * p.kernel[1], plane = p.output[0] * p.output[1];
  if (!s.bias.reserve(taps) || !s.reduced.reserve(p.reduced * stride)) return false;
  if (t.bias) copy<A>(t.bias + tile.group * taps, taps, s.bias.data);
  else zero(s.bias.data, taps);
  const T *span = t.span + tile.group * taps * p.reduced;
  if constexpr (std::is_same<T, A>::value) s.span = span;
  else {
    if (!s.converted_span.reserve(taps * p.reduced)) return false;
    copy<A>(span, taps * p.reduced, s.converted_span.data);
    s.span = s.converted_span.data;
  }

  if (s.reduced_pixels == tile.pixels) return true;
  s.reduced_pixels = tile.pixels;
  const T *from = t.second + tile.image * p.reduced * plane;
  for (int64_t i = tile.row; i < tile.row_end; ++i) {
    const int64_t at = i * p.output[1] + tile.column;
    A *to = s.reduced.data + (i - tile.row) * tile.columns();
    if (p.channels_last)
      transpose<A>(from + at * p.reduced, tile.columns(), p.reduced, p.reduced, to, stride);
    else
      for (int64_t r = 0; r < p.reduced; ++r)
        copy<A>(from + r * plane + at, tile.columns(), to + r * stride);
  }
  return true;
}

// The 1x1 convolution that spans kernels, for `count` pixels from `first` on.
template <class A>
void generate_kernels(const Problem &p, int64_t first, int64_t count, int64_t reduced_stride,
                      Scratch<A> &s) {
  constexpr int N = kLanes<A>;
  const int64_t taps = p.kernel[0] * p.kernel[1];
  // As many sums as the registers hold beside their factors; neither 3 x 3 nor 7 x 7 taps
  // leave a single one.
  const auto vectors = [&](int64_t i, auto some) {
    for_blocks<5, 4, 1>(taps, [&](int64_t t, auto block) {
      span_kernels<N, block(), some()>(s.span + t * p.reduced, s.bias.data + t, p.reduced,
                                       s.reduced.data + first + i * N, reduced_stride,
                                       s.kernels.data + t * kTapStride + i * N, kTapStride);
    });
  };
  if constexpr (BYTES == 64) for_blocks<4, 2, 1>(ceil_div(count, N), vectors);
  else for_blocks<2, 1>(ceil_div(count, N), vectors);
}

// Whether all is finite of rows of `count` values.
template <class A>
bool finite(const A *from, int64_t rows, int64_t row_length, int64_t count) {
  constexpr int N = kLanes<A>;
  Vector<A, N> sum = {};  // NaN as soon as anything is not finite
  A rest = 0;
  for (int64_t r = 0; r < rows; ++r, from += row_length) {
    int64_t i = 0;
    for (; i + N <= count; i += N) sum += load<N>(from + i) * A(0);
    for (; i < count; ++i) rest += from[i] * A(0);
  }
  A lanes[N];
  store<N>(lanes, sum);
  for (int i = 0; i < N; ++i) rest += lanes[i];
  return rest == 0;
}

// Zero for taps outside the image, of kernels or their gradient, [taps][kTapStride] pixels: a
// tap that meets no pixel has no part in anything, were its value infinite, and zeros of the
// scratch times infinities are NaN. Returns whether there is such a tap.
template <class A>
bool clear_outside(const Problem &p, const Tile &tile, int64_t row, int64_t rows,
                   A *kernels) {
  const int64_t columns = tile.columns();
  const Area area = tile.input(p, 0);
  if (area.top >= 0 && area.top + area.rows <= p.input[0] && area.left >= 0 &&
      area.left + area.columns <= p.input[1])
    return false;
  for (int64_t v = 0; v < p.kernel[1]; ++v) {
    const int64_t x = area.left + v * p.dilation[1], step = p.stride[1];
    const int64_t begin = min(ceil_div(max(-x, 0), step), columns);
    const int64_t end = max(min(ceil_div(max(p.input[1] - x, 0), step), columns), begin);
    for (int64_t u = 0; u < p.kernel[0]; ++u) {
      A *to = kernels + (u * p.kernel[1] + v) * kTapStride;
      for (int64_t i = 0; i < rows; ++i, to += columns) {
        const int64_t y = (row + i) * p.stride[0] - p.padding[0] + u * p.dilation[0];
        if (y < 0 || y >= p.input[0]) zero(to, columns);
        else {
          zero(to, begin);
          zero(to + end, columns - end);
        }
      }
    }
  }
  return true;
}

template <class T>
bool forward(const Problem &p, const Tile &tile, const Tensors<T> &tensors,
             Scratch<Accumulation<T>> &s) {
  using A = Accumulation<T>;
  const int64_t channels = p.channels / p.groups, taps = p.kernel[0] * p.kernel[1];
  const int64_t plane = p.output[0] * p.output[1], columns = tile.columns();
  const int64_t step = rows_at_once(columns);
  const int64_t reduced_stride = spread(tile.rows() * columns);
  if (!s.window.fill(channels_of(tile, p, p.input, tensors.first), channels,
                     p.channels_last ? p.channels : 0, p.input, tile.input(p, kPixels)) ||
      !s.offset.reserve(taps) || !s.kernels.reserve(taps * kTapStride) ||
      !s.out.reserve((step * columns + kPixels) * channels) ||
      (p.reduced && !read_generator(p, tile, tensors, reduced_stride, s)))
    return false;
  for (int64_t u = 0, t = 0; u < p.kernel[0]; ++u)
    for (int64_t v = 0; v < p.kernel[1]; ++v)
      s.offset.data[t++] =
          u * p.dilation[0] * s.window.row_length + v * p.dilation[1] * channels;

  for (int64_t row = tile.row; row < tile.row_end; row += step) {
    const int64_t rows = min(step, tile.row_end - row);
    const int64_t row_step = p.stride[0] * s.window.row_length;
    if (p.reduced)
      generate_kernels(p, (row - tile.row) * columns, rows * columns, reduced_stride, s);
    else read_kernels(p, tile, tensors.second, row, rows, s.kernels.data);
    const int64_t at = row * p.output[1] + tile.column;
    T *out = channels_of(tile, p, p.output, tensors.out);
    const auto sum_once = [&](A *to, int64_t to_row, int64_t to_column) {
      sum_pixels(s.window.buffer.data + (row - tile.row) * row_step, rows, columns, row_step,
                 p.stride[1] * channels, p.dilation[1] == 1 ? p.kernel[1] : 0, taps, channels,
                 s, to, to_row, to_column);
    };
    // Clearing the kernels beforehand would take as long as some of the taps.
    const auto sum_to = [&](A *to, int64_t to_row, int64_t to_column) {
      zero(s.zeros, kLanes<A>);
      sum_once(to, to_row, to_column);
      bool all_finite = true;
      for (A lane : s.zeros) all_finite &= lane == 0;
      if (!all_finite && clear_outside(p, tile, row, rows, s.kernels.data))
        sum_once(to, to_row, to_column);
    };
    if constexpr (std::is_same<T, A>::value)
      if (p.channels_last && columns >= kPixels && channels >= kLanes<A>) {
        sum_to(out + at * p.channels, p.output[1] * p.channels, p.channels);
        continue;
      }
    sum_to(s.out.data, columns * channels, channels);
    if (p.channels_last) {
      for (int64_t i = 0, pixel = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j, ++pixel)
          copy<A>(s.out.data + pixel * channels, channels,
                  out + (at + i * p.output[1] + j) * p.channels);
    } else if (columns == p.output[1]) {
      transpose<A>(s.out.data, rows * columns, channels, channels, out + at, plane);
    } else {
      for (int64_t i = 0; i < rows; ++i)
        transpose<A>(s.out.data + i * columns * channels, columns, channels, channels,
                     out + at + i * p.output[1], plane);
    }
  }
  return true;
}

template <class T>
bool grad_weight(const Problem &p, const Tile &tile, const Tensors<T> &tensors,
                 Scratch<Accumulation<T>> &s) {
  using A = Accumulation<T>;
  const int64_t channels = p.channels / p.groups, taps = p.kernel[0] * p.kernel[1];
  const int64_t plane = p.output[0] * p.output[1], columns = tile.columns();
  const int64_t step = rows_at_once(columns);
  // Vectors reach beyond rows that are shorter.
  const int64_t reach = max(columns, kLanes<A>);
  if (!s.planes.fill(channels_of(tile, p, p.input, tensors.second), channels,
                     p.channels_last ? p.channels : 0, p.input, tile.input(p, kLanes<A>),
                     p.stride[1]) ||
      !s.offset.reserve(taps) || !s.grad.reserve(channels * reach) ||
      !s.sum.reserve(taps * kLanes<A>) || !s.kernels.reserve(taps * kTapStride))
    return false;
  for (int64_t u = 0, t = 0; u < p.kernel[0]; ++u)
    for (int64_t v = 0; v < p.kernel[1]; ++v)
      s.offset.data[t++] =
          u * p.dilation[0] * s.planes.row_length + s.planes.column(v * p.dilation[1]);

  const T *grad = channels_of(tile, p, p.output, tensors.first);
  T *out = tensors.out + (tile.image * p.groups + tile.group) * taps * plane;
  for (int64_t row = tile.row; row < tile.row_end; row += step) {
    const int64_t rows = min(step, tile.row_end - row);
    bool all_finite = true;
    for (int64_t i = 0; i < rows; ++i) {
      const A *source = s.planes.buffer.data +
                        (row + i - tile.row) * p.stride[0] * s.planes.row_length;
      const int64_t at = (row + i) * p.output[1] + tile.column;
      if (p.channels_last)
        transpose<A>(grad + at * p.channels, columns, channels, p.channels, s.grad.data, reach);
      else
        for (int64_t c = 0; c < channels; ++c)
          copy<A>(grad + c * plane + at, columns, s.grad.data + c * reach);
      all_finite &= finite(s.grad.data, channels, reach, columns);
      for_vectors<A>(columns, [&](int64_t j, auto n, int64_t lanes) {
        constexpr int kBlock = BYTES == 64 ? 16 : 8;  // half of the vector registers
        for_blocks<kBlock, 4, 1>(channels, [&](int64_t c, auto block) {
          sum_channels<n(), block()>(source + c * s.planes.channel_stride + j,
                                     s.planes.channel_stride, s.grad.data + c * reach + j,
                                     reach, s.offset.data, taps, s.sum.data, c == 0);
        });
        for (int64_t t = 0; t < taps; ++t)
          store_some<n(), A>(s.kernels.data + t * kTapStride + i * columns + j,
                             load<n()>(s.sum.data + t * n()), lanes);
      });
    }
    if (!all_finite) clear_outside(p, tile, row, rows, s.kernels.data);
    // Longer runs than a vector, for the sake of the memory.
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t i = 0; i < rows; ++i)
        copy<A>(s.kernels.data + t * kTapStride + i * columns, columns,
                out + t * plane + (row + i) * p.output[1] + tile.column);
  }
  return true;
}

// The pixel at X = x + padding of the padded image is read by output j through tap v where
// X = j * stride + v * dilation. With X = q * stride + phase these are the taps with
// v * dilation % stride == phase, each for j = q - v * dilation / stride. Rows alike. So the
// pixels of one phase are sums over the outputs' gradients, as outputs are over pixels.
struct Phase {
  int64_t phase, begin, end;  // q in [begin, end) lies in the tile

  Phase(const Problem &p, int axis, int64_t phase, int64_t first, int64_t last)
      : phase(phase),
        begin(ceil_div(max(first + p.padding[axis] - phase, 0), p.stride[axis])),
        end(ceil_div(max(last + p.padding[axis] - phase, 0), p.stride[axis])) {}
};

template <class T>
bool grad_input(const Problem &p, const Tile &tile, const Tensors<T> &tensors,
                Scratch<Accumulation<T>> &s) {
  using A = Accumulation<T>;
  const int64_t channels = p.channels / p.groups, taps = p.kernel[0] * p.kernel[1];
  const int64_t plane = p.output[0] * p.output[1], pixels = p.input[0] * p.input[1];
  const T *weight = tensors.second + (tile.image * p.groups + tile.group) * taps * plane;
  T *out = channels_of(tile, p, p.input, tensors.out);

  // Every output that reads the tile, and as many columns as are summed at once.
  const auto first_output = [&](int axis, int64_t first) {
    return (first + p.padding[axis]) / p.stride[axis] -
           (p.kernel[axis] - 1) * p.dilation[axis] / p.stride[axis];
  };
  const auto last_output = [&](int axis, int64_t last) {
    return (last + p.padding[axis]) / p.stride[axis];
  };
  const int64_t top = first_output(0, tile.row), left = first_output(1, tile.column);
  const int64_t bottom = last_output(0, tile.row_end - 1);
  const int64_t right =
      last_output(1, max(tile.column_end, tile.column + kPixels * p.stride[1]) - 1);
  const int64_t step = rows_at_once(tile.columns());
  if (!s.window.fill(channels_of(tile, p, p.output, tensors.first), channels,
                     p.channels_last ? p.channels : 0, p.output,
                     {top, bottom + 1 - top, left, right + 1 - left}) ||
      !s.offset.reserve(taps) || !s.kernels.reserve(taps * kTapStride) ||
      !s.out.reserve((step * tile.columns() + kPixels) * channels))
    return false;

  const auto sum_chunk = [&](const Phase &down, const Phase &across, int64_t row, int64_t rows) {
    const int64_t count = across.end - across.begin;
    // Per tap of the two phases: its kernel values in the order of q, zero where there is no
    // output, and where the outputs' gradients begin in the window. The last tap comes
    // first: so the gradients of a row of taps are in their order.
    int64_t reaching = 0;
    for (int64_t u = p.kernel[0] - 1; u >= 0; --u) {
      if (u * p.dilation[0] % p.stride[0] != down.phase) continue;
      const int64_t i = row - u * p.dilation[0] / p.stride[0];  // the output row at `row`
      for (int64_t v = p.kernel[1] - 1; v >= 0; --v) {
        if (v * p.dilation[1] % p.stride[1] != across.phase) continue;
        const int64_t j = across.begin - v * p.dilation[1] / p.stride[1];
        const int64_t begin = min(max(-j, 0), count);
        const int64_t end = max(min(p.output[1] - j, count), begin);
        const T *from = weight + (u * p.kernel[1] + v) * plane + i * p.output[1] + j;
        A *to = s.kernels.data + reaching * kTapStride;
        for (int64_t r = 0; r < rows; ++r, from += p.output[1], to += count) {
          if (i + r < 0 || i + r >= p.output[0] || begin == end) {
            zero(to, count);
            continue;
          }
          zero(to, begin);
          copy<A>(from + begin, end - begin, to + begin);
          zero(to + end, count - end);
        }
        s.offset.data[reaching++] = (i - top) * s.window.row_length + (j - left) * channels;
      }
    }
    const bool whole_rows = p.stride[1] == 1 && p.dilation[1] == 1;
    sum_pixels(s.window.buffer.data, rows, count, s.window.row_length, channels,
               whole_rows ? p.kernel[1] : 0, reaching, channels, s, s.out.data,
               count * channels, channels);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t y = (row + r) * p.stride[0] + down.phase - p.padding[0];
      const A *from = s.out.data + r * count * channels;
      const int64_t x = across.begin * p.stride[1] + across.phase - p.padding[1];
      T *to = out + (y * p.input[1] + x) * (p.channels_last ? p.channels : 1);
      if (p.channels_last)
        for (int64_t q = 0; q < count; ++q)
          copy<A>(from + q * channels, channels, to + q * p.stride[1] * p.channels);
      else if (p.stride[1] == 1) transpose<A>(from, count, channels, channels, to, pixels);
      else
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t q = 0; q < count; ++q)
            store<1>(to + c * pixels + q * p.stride[1], load<1>(from + q * channels + c));
    }
  };
  for (int64_t i = 0; i < p.stride[0]; ++i)
    for (int64_t j = 0; j < p.stride[1]; ++j) {
      const Phase down(p, 0, i, tile.row, tile.row_end);
      const Phase across(p, 1, j, tile.column, tile.column_end);
      for (int64_t row = down.begin; row < down.end && across.begin < across.end; row += step)
        sum_chunk(down, across, row, min(step, down.end - row));
    }
  return true;
}

// ---- a range of tiles, by one thread

template <class T>
bool run(Operation operation, const Problem &p, int64_t begin, int64_t end,
         const void *const *inputs, void *out) {
  thread_local Scratch<Accumulation<T>> scratch;
  scratch.reduced_pixels = -1;
  const auto tensor = [&](int i) { return static_cast<const T *>(inputs[i]); };
  const Tensors<T> tensors{tensor(0), tensor(1), tensor(2), tensor(3), static_cast<T *>(out)};
  const auto kernel = operation == kForward     ? forward<T>
                      : operation == kGradInput ? grad_input<T>
                                                : grad_weight<T>;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile(index, p, operation == kGradInput ? p.input : p.output);
    if (!kernel(p, tile, tensors, scratch)) return false;
  }
  return true;
}

bool run_tiles(Operation operation, DType dtype, const Problem &p, int64_t begin, int64_t end,
               const void *const *inputs, void *out) {
  switch (dtype) {
    case kFloat64: return run<double>(operation, p, begin, end, inputs, out);
    case kFloat32: return run<float>(operation, p, begin, end, inputs, out);
    case kFloat16: return run<Half>(operation, p, begin, end, inputs, out);
    case kBFloat16: return run<BFloat>(operation, p, begin, end, inputs, out);
  }
  return false;
}

}  // namespace ISA
