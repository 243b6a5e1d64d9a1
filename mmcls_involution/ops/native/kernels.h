// The kernels, compiled once per instruction set: the including file defines ISA (a
// namespace) and BYTES (the width of its vectors).
//
// All three operations run over tiles of one image and group. What a tile reads is copied
// into scratch memory that the cache holds, zero-padded, converted to the accumulation
// type, and with columns split by their phase modulo the stride. There every tap of the
// kernel is a contiguous row at a fixed offset, whatever stride, padding and dilation are:
// the inner loops have neither bounds nor gathers. A vector runs along the columns, and a
// kernel value is loaded once for a whole block of channels of its group.
//
// No function of the standard library may end up in the object file: the linker would
// merge it with the copy that was compiled for another instruction set.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "involution.h"

namespace ISA {

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- memory types and vectors of N lanes

struct Half { uint16_t bits; };
struct BFloat { uint16_t bits; };

template <class T> struct AccumulationOf { using type = float; };
template <> struct AccumulationOf<double> { using type = double; };
template <class T> using Accumulation = typename AccumulationOf<T>::type;

template <class T, int N> struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T> struct VectorOf<T, 1> { using type = T; };
template <class T, int N> using Vector = typename VectorOf<T, N>::type;

template <class To, class From> inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V> inline V read(const void *from) {
  V v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

// N lanes of 16 bits, widened to 32.
template <int N> inline Vector<uint32_t, N> read_16_bits(const void *from) {
  if constexpr (N == 1) return read<uint16_t>(from);
  else return __builtin_convertvector(read<Vector<uint16_t, N>>(from), Vector<uint32_t, N>);
}

template <int N> inline Vector<double, N> load(const double *from) {
  return read<Vector<double, N>>(from);
}

template <int N> inline Vector<float, N> load(const float *from) {
  return read<Vector<float, N>>(from);
}

template <int N> inline Vector<float, N> load(const BFloat *from) {
  return bits_as<Vector<float, N>>(Vector<uint32_t, N>(read_16_bits<N>(from) << 16));
}

template <int N> inline Vector<float, N> load(const Half *from) {
  using U = Vector<uint32_t, N>;
  const U half = read_16_bits<N>(from), magnitude = (half & 0x7fff) << 13;
  // The multiplication rebiases the exponent, of subnormals too.
  U bits = bits_as<U>(Vector<float, N>(bits_as<Vector<float, N>>(magnitude) * 0x1p112f));
  U special;  // all ones for infinity and NaN
  if constexpr (N == 1) special = magnitude >= 0x0f800000 ? ~0u : 0u;
  else special = bits_as<U>(magnitude >= 0x0f800000);
  bits |= (special & 0x7f800000) | ((half & 0x8000) << 16);
  return bits_as<Vector<float, N>>(bits);
}

template <int N> inline void store(double *to, Vector<double, N> v) {
  std::memcpy(to, &v, sizeof(v));
}

template <int N> inline void store(float *to, Vector<float, N> v) {
  std::memcpy(to, &v, sizeof(v));
}

// To nearest, ties to even; NaN stays NaN.
inline uint16_t round_to(BFloat, float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t round_to(Half, float value) {
  uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);  // beyond the largest number
  // Adding 0.5 rounds to multiples of 2^-24, the smallest subnormal.
  if (bits < 0x38800000)
    return uint16_t(sign | (bits_as<uint32_t>(bits_as<float>(bits) + 0.5f) - 0x3f000000));
  return uint16_t(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13));
}

template <int N, class T, std::enable_if_t<std::is_class<T>::value, int> = 0>
inline void store(T *to, Vector<float, N> v) {
  float lanes[N];
  std::memcpy(lanes, &v, sizeof(v));
  for (int i = 0; i < N; ++i) to[i].bits = round_to(T{}, lanes[i]);
}

// ---- inner loops, over taps at `offset` in `source` and C channels

// out[c][0:N] = sum over t of factor[t][0:N] * source[c][offset[t] + 0:N]
template <int N, int C, class A, class F, class T>
inline void sum_taps(const A *source, int64_t source_stride, const F *factor,
                     int64_t factor_stride, const int64_t *offset, int64_t taps, T *out,
                     int64_t out_stride) {
  Vector<A, N> sum[C] = {};
  for (int64_t t = 0; t < taps; ++t) {
    const Vector<A, N> k = load<N>(factor + t * factor_stride);
    const A *from = source + offset[t];
    for (int c = 0; c < C; ++c) sum[c] += k * load<N>(from + c * source_stride);
  }
  for (int c = 0; c < C; ++c) store<N>(out + c * out_stride, sum[c]);
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

template <int I> using Constant = std::integral_constant<int, I>;

// Calls f(channel, Constant<block size>) until `channels` are covered.
template <class F> inline void for_channel_blocks(int64_t channels, F &&f) {
  constexpr int kBlock = BYTES == 64 ? 16 : 8;  // half of the vector registers
  int64_t c = 0;
  for (; c + kBlock <= channels; c += kBlock) f(c, Constant<kBlock>{});
  for (; c + 4 <= channels; c += 4) f(c, Constant<4>{});
  for (; c < channels; ++c) f(c, Constant<1>{});
}

// Calls f(column, Constant<lanes>) for vectors that cover `columns`. The last one is moved
// left to end where they end, so some columns may be computed twice.
template <class A, int N = BYTES / int(sizeof(A)), class F>
inline void for_columns(int64_t columns, F &&f) {
  if constexpr (N > 1)
    if (columns < N) return for_columns<A, N / 2>(columns, f);
  for (int64_t j = 0; j < columns; j += N) f(min(j, columns - N), Constant<N>{});
}

// ---- scratch memory, one per thread

// Uninitialized memory that grows and is kept for the next tile.
template <class T> struct Buffer {
  T *data = nullptr;
  int64_t capacity = 0;

  Buffer() = default;
  Buffer(const Buffer &) = delete;
  ~Buffer() { std::free(data); }

  bool reserve(int64_t size) {
    if (size <= capacity) return true;
    std::free(data);
    data = static_cast<T *>(std::malloc(size_t(size) * sizeof(T)));
    capacity = data ? size : 0;
    return data != nullptr;
  }
};

template <class A> inline void zero(A *to, int64_t count) {
  if (count > 0) std::memset(to, 0, size_t(count) * sizeof(A));
}

template <class A, class T> inline void copy(const T *from, int64_t count, A *to) {
  for_columns<A>(count, [&](int64_t i, auto n) { store<n()>(to + i, load<n()>(from + i)); });
}

// A window of an image, zero where it lies outside of the image. The window's column q is
// stored by phase q % stride, then by q / stride.
template <class A> struct Window {
  Buffer<A> buffer;
  int64_t stride, phase_length, row_length, channel_stride;

  int64_t column(int64_t q) const { return q % stride * phase_length + q / stride; }

  const A *channel(int64_t c) const { return buffer.data + c * channel_stride; }

  // Reads rows [top, top + rows) and columns [left, left + columns) of `image`, which is
  // [channels, height, width].
  template <class T>
  bool fill(const T *image, int64_t channels, int64_t height, int64_t width, int64_t top,
            int64_t rows, int64_t left, int64_t columns, int64_t column_stride) {
    stride = column_stride;
    phase_length = ceil_div(columns, stride);
    row_length = phase_length * stride;
    channel_stride = rows * row_length;
    // Channels a multiple of 1 KiB apart would share few sets of the cache.
    if (channel_stride % 256 == 0) channel_stride += 16;
    if (!buffer.reserve(channels * channel_stride)) return false;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t r = 0; r < rows; ++r) {
        A *to = buffer.data + c * channel_stride + r * row_length;
        const int64_t y = top + r;
        if (y < 0 || y >= height) zero(to, row_length);
        else
          for (int64_t phase = 0; phase < stride; ++phase, to += phase_length)
            fill_phase(image + (c * height + y) * width, width, left + phase, to);
      }
    return true;
  }

 private:
  // Reads columns start, start + stride, ... of a row.
  template <class T> void fill_phase(const T *row, int64_t width, int64_t start, A *to) {
    const int64_t begin = start < 0 ? min(ceil_div(-start, stride), phase_length) : 0;
    const int64_t end = start < width ? min(ceil_div(width - start, stride), phase_length) : 0;
    if (begin >= end) return zero(to, phase_length);
    zero(to, begin);
    const T *from = row + start + begin * stride;
    if (stride == 1) copy(from, end - begin, to + begin);
    else
      for (int64_t i = begin; i < end; ++i, from += stride) store<1>(to + i, load<1>(from));
    zero(to + end, phase_length - end);
  }
};

template <class A> struct Scratch {
  Window<A> window;
  Buffer<A> factor, sum;
  Buffer<int64_t> offset;
};

// ---- tiles

// A part of the pixels of one image and group.
struct Tile {
  static constexpr int64_t kRows = 8, kColumns = 256;
  int64_t image, group, row, row_end, column, column_end;

  Tile(int64_t index, const Problem &p, const int64_t *size) {
    const int64_t across = ceil_div(size[1], kColumns), down = ceil_div(size[0], kRows);
    column = index % across * kColumns;
    row = index / across % down * kRows;
    group = index / across / down % p.groups;
    image = index / across / down / p.groups;
    row_end = min(row + kRows, size[0]);
    column_end = min(column + kColumns, size[1]);
  }
};

int64_t tile_count(Operation operation, const Problem &p) {
  const int64_t *size = operation == kGradInput ? p.input : p.output;
  return p.batch * p.groups * ceil_div(size[0], Tile::kRows) * ceil_div(size[1], Tile::kColumns);
}

// Reads the input that the outputs of a tile read, and each tap's offset in it.
template <class A, class T>
bool read_input(const Problem &p, const Tile &tile, const T *input, Scratch<A> &s) {
  const int64_t channels = p.channels / p.groups;
  const int64_t rows = (tile.row_end - tile.row - 1) * p.stride[0] +
                       (p.kernel[0] - 1) * p.dilation[0] + 1;
  const int64_t columns = (tile.column_end - tile.column - 1) * p.stride[1] +
                          (p.kernel[1] - 1) * p.dilation[1] + 1;
  input += (tile.image * p.channels + tile.group * channels) * p.input[0] * p.input[1];
  if (!s.window.fill(input, channels, p.input[0], p.input[1],
                     tile.row * p.stride[0] - p.padding[0], rows,
                     tile.column * p.stride[1] - p.padding[1], columns, p.stride[1]) ||
      !s.offset.reserve(p.kernel[0] * p.kernel[1]))
    return false;
  int64_t *offset = s.offset.data;
  for (int64_t u = 0; u < p.kernel[0]; ++u)
    for (int64_t v = 0; v < p.kernel[1]; ++v)
      *offset++ = u * p.dilation[0] * s.window.row_length + s.window.column(v * p.dilation[1]);
  return true;
}

template <class T>
bool forward(const Problem &p, const Tile &tile, const T *input, const T *weight, T *out,
             Scratch<Accumulation<T>> &s) {
  using A = Accumulation<T>;
  if (!read_input(p, tile, input, s)) return false;
  const int64_t channels = p.channels / p.groups, taps = p.kernel[0] * p.kernel[1];
  const int64_t plane = p.output[0] * p.output[1];
  weight += (tile.image * p.groups + tile.group) * taps * plane;
  out += (tile.image * p.channels + tile.group * channels) * plane;
  for (int64_t i = tile.row; i < tile.row_end; ++i) {
    const int64_t row = (i - tile.row) * p.stride[0] * s.window.row_length;
    const int64_t at = i * p.output[1] + tile.column;
    for_columns<A>(tile.column_end - tile.column, [&](int64_t j, auto n) {
      for_channel_blocks(channels, [&](int64_t c, auto block) {
        sum_taps<n(), block()>(s.window.channel(c) + row + j, s.window.channel_stride,
                               weight + at + j, plane, s.offset.data, taps,
                               out + c * plane + at + j, plane);
      });
    });
  }
  return true;
}

// The same for channels_last memory: input [N,H,W,C], weight [N,Ho,Wo,G,Kh,Kw], output
// [N,Ho,Wo,C]. A vector runs along the channels of the group; blocks of pixels give the
// processor independent sums to work at. The window here is [rows][columns][channels].
template <class T>
bool forward_channels_last(const Problem &p, const Tile &tile, const T *input, const T *weight,
                           T *out, Scratch<Accumulation<T>> &s) {
  using A = Accumulation<T>;
  const int64_t channels = p.channels / p.groups, taps = p.kernel[0] * p.kernel[1];
  const int64_t rows = (tile.row_end - tile.row - 1) * p.stride[0] +
                       (p.kernel[0] - 1) * p.dilation[0] + 1;
  const int64_t columns = (tile.column_end - tile.column - 1) * p.stride[1] +
                          (p.kernel[1] - 1) * p.dilation[1] + 1;
  if (!s.factor.reserve(rows * columns * channels) || !s.offset.reserve(taps)) return false;
  const int64_t top = tile.row * p.stride[0] - p.padding[0];
  const int64_t left = tile.column * p.stride[1] - p.padding[1];
  input += tile.image * p.input[0] * p.input[1] * p.channels + tile.group * channels;
  A *to = s.factor.data;
  for (int64_t y = top; y < top + rows; ++y)
    for (int64_t x = left; x < left + columns; ++x, to += channels) {
      if (y < 0 || y >= p.input[0] || x < 0 || x >= p.input[1]) zero(to, channels);
      else copy(input + (y * p.input[1] + x) * p.channels, channels, to);
    }
  for (int64_t u = 0, t = 0; u < p.kernel[0]; ++u)
    for (int64_t v = 0; v < p.kernel[1]; ++v)
      s.offset.data[t++] = (u * p.dilation[0] * columns + v * p.dilation[1]) * channels;

  const int64_t step = p.groups * taps;  // of the kernels, from pixel to pixel
  for (int64_t i = tile.row; i < tile.row_end; ++i) {
    const A *row = s.factor.data + (i - tile.row) * p.stride[0] * columns * channels;
    const auto pixels = [&](int64_t j, auto block) {
      const int64_t pixel = (tile.image * p.output[0] + i) * p.output[1] + j;
      const T *factor = weight + pixel * step + tile.group * taps;
      const A *source = row + (j - tile.column) * p.stride[1] * channels;
      const int64_t next = p.stride[1] * channels;
      for_columns<A>(channels, [&](int64_t c, auto n) {
        Vector<A, n()> sum[block()] = {};
        for (int64_t t = 0; t < taps; ++t)
          for (int b = 0; b < block(); ++b)
            sum[b] += load<1>(factor + b * step + t) *
                      load<n()>(source + b * next + c + s.offset.data[t]);
        for (int b = 0; b < block(); ++b)
          store<n()>(out + (pixel + b) * p.channels + tile.group * channels + c, sum[b]);
      });
    };
    int64_t j = tile.column;
    for (; j + 8 <= tile.column_end; j += 8) pixels(j, Constant<8>{});
    for (; j < tile.column_end; ++j) pixels(j, Constant<1>{});
  }
  return true;
}

template <class T>
bool grad_weight(const Problem &p, const Tile &tile, const T *grad, const T *input, T *out,
                 Scratch<Accumulation<T>> &s) {
  using A = Accumulation<T>;
  const int64_t channels = p.channels / p.groups, taps = p.kernel[0] * p.kernel[1];
  const int64_t plane = p.output[0] * p.output[1], columns = tile.column_end - tile.column;
  if (!read_input(p, tile, input, s) || !s.factor.reserve(channels * columns) ||
      !s.sum.reserve(taps * (BYTES / int64_t(sizeof(A)))))
    return false;
  grad += (tile.image * p.channels + tile.group * channels) * plane;
  out += (tile.image * p.groups + tile.group) * taps * plane;
  for (int64_t i = tile.row; i < tile.row_end; ++i) {
    const int64_t row = (i - tile.row) * p.stride[0] * s.window.row_length;
    const int64_t at = i * p.output[1] + tile.column;
    for (int64_t c = 0; c < channels; ++c)
      copy(grad + c * plane + at, columns, s.factor.data + c * columns);
    for_columns<A>(columns, [&](int64_t j, auto n) {
      for_channel_blocks(channels, [&](int64_t c, auto block) {
        sum_channels<n(), block()>(s.window.channel(c) + row + j, s.window.channel_stride,
                                   s.factor.data + c * columns + j, columns, s.offset.data,
                                   taps, s.sum.data, c == 0);
      });
      for (int64_t t = 0; t < taps; ++t)
        store<n()>(out + t * plane + at + j, load<n()>(s.sum.data + t * n()));
    });
  }
  return true;
}

// The pixel at X = x + padding of the padded image is read by output j through tap v where
// X = j * stride + v * dilation. With X = t * stride + phase these are the taps with
// v * dilation % stride == phase, each for j = t - v * dilation / stride. Rows alike.
template <class T>
bool grad_input(const Problem &p, const Tile &tile, const T *grad, const T *weight, T *out,
                Scratch<Accumulation<T>> &s) {
  using A = Accumulation<T>;
  const int64_t channels = p.channels / p.groups, taps = p.kernel[0] * p.kernel[1];
  const int64_t plane = p.output[0] * p.output[1], pixels = p.input[0] * p.input[1];
  const int64_t stride = p.stride[1];
  grad += (tile.image * p.channels + tile.group * channels) * plane;
  weight += (tile.image * p.groups + tile.group) * taps * plane;
  out += (tile.image * p.channels + tile.group * channels) * pixels;

  // Every output that reads the tile: rows [top, bottom) and columns [left, right).
  const int64_t up = (p.kernel[0] - 1) * p.dilation[0] / p.stride[0];
  const int64_t top = max((tile.row + p.padding[0]) / p.stride[0] - up, 0);
  const int64_t bottom = min((tile.row_end - 1 + p.padding[0]) / p.stride[0] + 1, p.output[0]);
  const int64_t left = (tile.column + p.padding[1]) / stride -
                       (p.kernel[1] - 1) * p.dilation[1] / stride;
  const int64_t right = (tile.column_end - 1 + p.padding[1]) / stride + 1;
  if (!s.window.fill(grad, channels, p.output[0], p.output[1], top, max(bottom - top, 0), left,
                     right - left, 1) ||
      !s.offset.reserve(taps) || !s.factor.reserve(taps * (tile.column_end - tile.column)))
    return false;

  for (int64_t y = tile.row; y < tile.row_end; ++y)
    for (int64_t phase = 0; phase < stride; ++phase) {
      // The tile's columns of this phase are t in [from, to).
      const int64_t from = ceil_div(max(tile.column + p.padding[1] - phase, 0), stride);
      const int64_t to = ceil_div(max(tile.column_end + p.padding[1] - phase, 0), stride);
      const int64_t count = to - from;
      if (count <= 0) continue;

      // Per tap that reaches this row: its kernel values in the order of t, zero where
      // there is no output, and where the outputs' gradients begin in the window.
      int64_t reaching = 0;
      for (int64_t u = 0; u < p.kernel[0]; ++u) {
        const int64_t rest = y + p.padding[0] - u * p.dilation[0], i = rest / p.stride[0];
        if (rest < 0 || rest % p.stride[0] != 0 || i >= p.output[0]) continue;
        for (int64_t v = 0; v < p.kernel[1]; ++v) {
          if (v * p.dilation[1] % stride != phase) continue;
          const int64_t first = from - v * p.dilation[1] / stride;  // the output at `from`
          const int64_t begin = min(max(-first, 0), count);
          const int64_t end = max(min(p.output[1] - first, count), begin);
          A *factor = s.factor.data + reaching * count;
          zero(factor, begin);
          if (begin < end)
            copy(weight + (u * p.kernel[1] + v) * plane + i * p.output[1] + first + begin,
                 end - begin, factor + begin);
          zero(factor + end, count - end);
          s.offset.data[reaching++] = (i - top) * s.window.row_length + first - left;
        }
      }

      T *row = out + y * p.input[1] + from * stride + phase - p.padding[1];
      for_columns<A>(count, [&](int64_t t, auto n) {
        for_channel_blocks(channels, [&](int64_t c, auto block) {
          const A *source = s.window.channel(c) + t, *factor = s.factor.data + t;
          if (stride == 1)
            return sum_taps<n(), block()>(source, s.window.channel_stride, factor, count,
                                          s.offset.data, reaching, row + c * pixels + t, pixels);
          A lanes[block() * n()];
          sum_taps<n(), block()>(source, s.window.channel_stride, factor, count, s.offset.data,
                                 reaching, lanes, n());
          for (int b = 0; b < block(); ++b)
            for (int l = 0; l < n(); ++l)
              store<1>(row + (c + b) * pixels + (t + l) * stride, lanes[b * n() + l]);
        });
      });
    }
  return true;
}

// ---- a range of tiles, by one thread

template <class T>
bool run(Operation operation, const Problem &p, int64_t begin, int64_t end, const void *a,
         const void *b, void *out) {
  thread_local Scratch<Accumulation<T>> scratch;
  const auto kernel = operation == kForward              ? forward<T>
                      : operation == kForwardChannelsLast ? forward_channels_last<T>
                      : operation == kGradInput           ? grad_input<T>
                                                          : grad_weight<T>;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile(index, p, operation == kGradInput ? p.input : p.output);
    if (!kernel(p, tile, static_cast<const T *>(a), static_cast<const T *>(b),
                static_cast<T *>(out), scratch))
      return false;
  }
  return true;
}

bool run_tiles(Operation operation, DType dtype, const Problem &p, int64_t begin, int64_t end,
               const void *a, const void *b, void *out) {
  switch (dtype) {
    case kFloat64: return run<double>(operation, p, begin, end, a, b, out);
    case kFloat32: return run<float>(operation, p, begin, end, a, b, out);
    case kFloat16: return run<Half>(operation, p, begin, end, a, b, out);
    case kBFloat16: return run<BFloat>(operation, p, begin, end, a, b, out);
  }
  return false;
}

}  // namespace ISA
