// Scratch memory, and the parts of an image that are copied there. Like kernels.h, compiled
// once per instruction set.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "vectors.h"

namespace ISA {

// Uninitialized memory that grows and is kept for the next tile. Vectors may touch one of
// their lengths behind its end.
template <class T> struct Buffer {
  T *data = nullptr;
  int64_t capacity = 0;

  Buffer() = default;
  Buffer(const Buffer &) = delete;
  ~Buffer() { std::free(data); }

  bool reserve(int64_t size) {
    if (size <= capacity) return true;
    std::free(data);
    const int64_t lines = ceil_div(size * int64_t(sizeof(T)), 64) + 1;
    data = static_cast<T *>(std::aligned_alloc(64, size_t(lines) * 64));
    capacity = data ? size : 0;
    return data != nullptr;
  }
};

// A row length for which rows are aligned, and do not share few sets of the cache as they
// would at a distance of 1 KiB.
inline int64_t spread(int64_t length) {
  length = ceil_div(length, 16) * 16;
  return length % 256 == 0 ? length + 16 : length;
}

// a * b elements, or more than any memory holds where 64-bit numbers do not count them.
inline int64_t elements(int64_t a, int64_t b) {
  const int64_t most = int64_t(1) << 56;
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? most : min(product, most);
}

// The part of an image that a tile reads, zero where it lies outside of the image.
struct Area {
  int64_t top, rows, left, columns;
};

// An area as [rows][columns][channels].
template <class A> struct PixelWindow {
  Buffer<A> buffer;
  int64_t row_length;

  // `image` points to the first channel of the group; it is [height, width, all_channels] if
  // that is not 0, else [channels, height, width].
  template <class T>
  bool fill(const T *image, int64_t channels, int64_t all_channels, const int64_t *size,
            const Area &area) {
    row_length = elements(area.columns, channels);
    if (!buffer.reserve(elements(area.rows, row_length))) return false;
    const int64_t begin = min(max(-area.left, 0), area.columns);
    const int64_t end = max(min(size[1] - area.left, area.columns), begin);
    for (int64_t r = 0; r < area.rows; ++r) {
      A *row = buffer.data + r * row_length;
      const int64_t y = area.top + r;
      if (y < 0 || y >= size[0] || begin == end) {
        zero(row, row_length);
        continue;
      }
      zero(row, begin * channels);
      const int64_t at = y * size[1] + area.left + begin;
      if (!all_channels)
        transpose<A>(image + at, channels, end - begin, size[0] * size[1],
                     row + begin * channels, channels);
      else
        for (int64_t q = begin; q < end; ++q)
          copy<A>(image + (at + q - begin) * all_channels, channels, row + q * channels);
      zero(row + end * channels, (area.columns - end) * channels);
    }
    return true;
  }
};

// An area as [channels][rows][phases][columns of a phase]: column q is stored by phase
// q % stride, then by q / stride.
template <class A> struct PlanarWindow {
  Buffer<A> buffer;
  int64_t stride, phase_length, row_length, channel_stride;

  int64_t column(int64_t q) const { return q % stride * phase_length + q / stride; }

  // `image` as in PixelWindow.
  template <class T>
  bool fill(const T *image, int64_t channels, int64_t all_channels, const int64_t *size,
            const Area &area, int64_t column_stride) {
    stride = column_stride;
    phase_length = ceil_div(area.columns, stride);
    row_length = phase_length * stride;
    channel_stride = spread(elements(area.rows, row_length));
    if (!buffer.reserve(elements(channels, channel_stride))) return false;
    for (int64_t r = 0; r < area.rows; ++r)
      for (int64_t phase = 0; phase < stride; ++phase) {
        // Columns start, start + stride, ... of the image, those in [begin, end) inside of it.
        const int64_t y = area.top + r, start = area.left + phase;
        int64_t begin = start < 0 ? min(ceil_div(-start, stride), phase_length) : 0;
        int64_t end = start < size[1] ? min(ceil_div(size[1] - start, stride), phase_length) : 0;
        if (begin >= end || y < 0 || y >= size[0]) begin = end = phase_length;
        A *to = buffer.data + r * row_length + phase * phase_length;
        for (int64_t c = 0; c < channels; ++c) {
          zero(to + c * channel_stride, begin);
          zero(to + c * channel_stride + end, phase_length - end);
        }
        if (begin == end) continue;
        const T *from = image + (y * size[1] + start + begin * stride) * max(all_channels, 1);
        to += begin;
        if (all_channels) {
          transpose<A>(from, end - begin, channels, stride * all_channels, to, channel_stride);
          continue;
        }
        for (int64_t c = 0; c < channels; ++c, from += size[0] * size[1], to += channel_stride)
          if (stride == 1) copy<A>(from, end - begin, to);
          else
            for (int64_t i = 0; i < end - begin; ++i)
              store<1>(to + i, load<1>(from + i * stride));
      }
    return true;
  }
};

}  // namespace ISA
