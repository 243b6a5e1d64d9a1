// Vectors of N lanes over memory of any type, loops over them, and the transposition. Like
// kernels.h, compiled once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

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

// A load that compilers keep in a register. Others they repeat for each of several uses,
// to save an instruction, where it is loads that take the time.
template <int N, class T> inline Vector<T, N> load_once(const T *from) {
  typedef T V __attribute__((vector_size(N * sizeof(T)), aligned(sizeof(T)), may_alias));
  return *reinterpret_cast<const volatile V *>(from);
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

// ---- loops over vectors

template <int I> using Constant = std::integral_constant<int, I>;

template <class A> constexpr int kLanes = BYTES / int(sizeof(A));

// Calls f(Constant<0>), f(Constant<1>), ... Inlined whatever its size: what f refers to
// stays in registers.
template <class F, int... I>
__attribute__((always_inline)) inline void unroll(F &&f, std::integer_sequence<int, I...>) {
  (f(Constant<I>{}), ...);
}
template <int Count, class F> __attribute__((always_inline)) inline void unroll(F &&f) {
  unroll(f, std::make_integer_sequence<int, Count>{});
}

// Calls f(i, Constant<lanes>) for vectors that cover [0, count) and nothing else. The last
// one is moved left to end there, so some elements may be computed twice.
template <class A, int N = kLanes<A>, class F> inline void for_exactly(int64_t count, F &&f) {
  if constexpr (N > 1)
    if (count < N) return for_exactly<A, N / 2>(count, f);
  for (int64_t i = 0; i < count; i += N) f(min(i, count - N), Constant<N>{});
}

// The same with fewer kinds of vectors: where one vector is more than enough, it reaches
// beyond. f(i, Constant<lanes>, lanes that count).
template <class A, int N = kLanes<A>, class F> inline void for_vectors(int64_t count, F &&f) {
  if constexpr (N * sizeof(A) > 16)
    if (count <= N / 2) return for_vectors<A, N / 2>(count, f);
  if (count < N) return f(0, Constant<N>{}, count);
  for (int64_t i = 0; i < count; i += N) f(min(i, count - N), Constant<N>{}, int64_t(N));
}

// Calls f(i, Constant<block>) until `count` is covered, with the largest blocks first.
template <int Block, int... Smaller, class F>
inline void for_blocks(int64_t count, F &&f, int64_t i = 0) {
  for (; i + Block <= count; i += Block) f(i, Constant<Block>{});
  if constexpr (sizeof...(Smaller) > 0) for_blocks<Smaller...>(count, f, i);
}

template <class A, int N = kLanes<A>, class From, class To>
inline void copy(const From *from, int64_t count, To *to) {
  for_exactly<A, N>(count, [&](int64_t i, auto n) { store<n()>(to + i, load<n()>(from + i)); });
}

template <class A> inline void zero(A *to, int64_t count) {
  if (count > 0) std::memset(to, 0, size_t(count) * sizeof(A));
}

// The first `count` lanes.
template <int N, class A, class T>
inline void store_some(T *to, Vector<A, N> v, int64_t count) {
  if (count == N) return store<N>(to, v);
  A lanes[N];
  store<N>(lanes, v);
  copy<A, N / 2>(lanes, count, to);
}

// ---- transposition

// Lanes first[0], second[0], first[1], second[1], ... from lane `begin` on.
template <int begin, class V, int... I>
inline V interleave(V first, V second, std::integer_sequence<int, I...>) {
  constexpr int N = sizeof...(I);
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(first, second, (begin + I / 2 + I % 2 * N)...);
#else
  using Index = std::conditional_t<sizeof(V) / N == 8, int64_t, int32_t>;
  return __builtin_shuffle(first, second, Vector<Index, N>{(begin + I / 2 + I % 2 * N)...});
#endif
}

// to[j][i] = from[i][j] for i, j < N. A riffle of the rows, log2(N) times.
template <int N, class A, class From, class To>
inline void transpose_block(const From *from, int64_t from_stride, To *to, int64_t to_stride) {
  if constexpr (N == 1) return store<1>(to, load<1>(from));
  else {
    Vector<A, N> row[N], next[N];
    for (int i = 0; i < N; ++i) row[i] = load<N>(from + i * from_stride);
    constexpr auto lanes = std::make_integer_sequence<int, N>{};
    for (int step = 1; step < N; step *= 2) {
      for (int i = 0; i < N / 2; ++i) {
        next[2 * i] = interleave<0>(row[i], row[i + N / 2], lanes);
        next[2 * i + 1] = interleave<N / 2>(row[i], row[i + N / 2], lanes);
      }
      for (int i = 0; i < N; ++i) row[i] = next[i];
    }
    for (int i = 0; i < N; ++i) store<N>(to + i * to_stride, row[i]);
  }
}

template <class A, int N = kLanes<A>, class From, class To>
void transpose(const From *from, int64_t rows, int64_t columns, int64_t from_stride, To *to,
               int64_t to_stride) {
  if constexpr (N > 1)
    if (rows < N || columns < N)
      return transpose<A, N / 2>(from, rows, columns, from_stride, to, to_stride);
  for (int64_t i = 0; i < rows; i += N)
    for (int64_t j = 0; j < columns; j += N) {
      const int64_t r = min(i, rows - N), c = min(j, columns - N);
      transpose_block<N, A>(from + r * from_stride + c, from_stride, to + c * to_stride + r,
                            to_stride);
    }
}

}  // namespace ISA
