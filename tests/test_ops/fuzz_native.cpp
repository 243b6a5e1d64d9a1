// Random problems through the C++ kernels, against plain loops. Built with sanitizers by
// test_native.py; every array has its exact size, so that a step outside is seen.
//
//   fuzz_native NUMBER_OF_PROBLEMS SEED

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "involution.h"

using Array = std::vector<double>;

// Calls f(index into the input, the kernels and the output) for every multiplication.
template <class F> void for_each(const Problem &p, F &&f) {
  const int64_t per_group = p.channels / p.groups;
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t c = 0; c < p.channels; ++c)
      for (int64_t u = 0; u < p.kernel[0]; ++u)
        for (int64_t v = 0; v < p.kernel[1]; ++v)
          for (int64_t i = 0; i < p.output[0]; ++i)
            for (int64_t j = 0; j < p.output[1]; ++j) {
              const int64_t y = i * p.stride[0] + u * p.dilation[0] - p.padding[0];
              const int64_t x = j * p.stride[1] + v * p.dilation[1] - p.padding[1];
              if (y < 0 || y >= p.input[0] || x < 0 || x >= p.input[1]) continue;
              const int64_t group = n * p.groups + c / per_group;
              const int64_t kernel = (group * p.kernel[0] + u) * p.kernel[1] + v;
              f(((n * p.channels + c) * p.input[0] + y) * p.input[1] + x,
                (kernel * p.output[0] + i) * p.output[1] + j,
                ((n * p.channels + c) * p.output[0] + i) * p.output[1] + j);
            }
}

using Inputs = std::vector<Array>;

template <class T> bool agrees(Operation operation, DType dtype, const Problem &p,
                               const Inputs &inputs, const Array &expected, double tolerance) {
  std::vector<std::vector<T>> copies;
  for (const Array &input : inputs) copies.emplace_back(input.begin(), input.end());
  const void *pointers[4] = {};
  for (size_t i = 0; i < copies.size(); ++i) pointers[i] = copies[i].data();
  std::vector<T> out(expected.size(), T(1e9));
  if (involution(operation, dtype, &p, pointers, out.data(), nullptr, 2)) return false;
  for (size_t i = 0; i < out.size(); ++i)
    if (!(std::abs(out[i] - expected[i]) <= tolerance * (1 + std::abs(expected[i])))) return false;
  return true;
}

// Half precision has no type here: only the memory that it touches is checked.
void touch(Operation operation, DType dtype, const Problem &p, const Inputs &inputs, size_t out) {
  std::vector<std::vector<uint16_t>> copies;
  for (const Array &input : inputs) copies.emplace_back(input.size(), 0x3c01);
  const void *pointers[4] = {};
  for (size_t i = 0; i < copies.size(); ++i) pointers[i] = copies[i].data();
  std::vector<uint16_t> result(out);
  involution(operation, dtype, &p, pointers, result.data(), nullptr, 2);
}

bool passes(Operation operation, const Problem &p, const Inputs &inputs, const Array &expected) {
  for (DType dtype : {kFloat16, kBFloat16}) touch(operation, dtype, p, inputs, expected.size());
  return agrees<double>(operation, kFloat64, p, inputs, expected, 1e-13) &&
         agrees<float>(operation, kFloat32, p, inputs, expected, 1e-4);
}

// [N,C,...pixels] to [N,...pixels,C], or kernels [N,G*K*K,...pixels] likewise.
Array channels_last(const Array &array, int64_t batch, int64_t channels, int64_t pixels) {
  Array out(array.size());
  for (int64_t n = 0; n < batch; ++n)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < pixels; ++i)
        out[(n * pixels + i) * channels + c] = array[(n * channels + c) * pixels + i];
  return out;
}

int main(int, char **argv) {
  std::mt19937 random(std::atoi(argv[2]));
  auto draw = [&](int low, int high) { return int64_t(low + random() % (high - low + 1)); };
  const char *sets[] = {"avx512", "avx2", "baseline"};
  const long problems = std::atol(argv[1]);
  for (long k = 0; k < problems; ++k) {
    involution_use_instruction_set(sets[k % 3]);
    Problem p;
    p.batch = draw(0, 2), p.groups = draw(1, 2);
    p.reduced = p.channels_last = 0;
    p.channels = p.groups * (k % 2 ? draw(1, 9) : draw(1, 34));
    for (int d = 0; d < 2; ++d) {
      p.kernel[d] = draw(1, 5), p.stride[d] = draw(1, 3);
      p.padding[d] = draw(0, 6), p.dilation[d] = draw(1, 3);
      p.input[d] = k % 64 == 0 && d == 1 ? draw(250, 530) : draw(1, 19);
      const int64_t span = p.input[d] + 2 * p.padding[d] - p.dilation[d] * (p.kernel[d] - 1) - 1;
      p.output[d] = span < 0 ? 0 : span / p.stride[d] + 1;
    }
    if (p.output[0] == 0 || p.output[1] == 0) continue;
    const size_t pixels = p.batch * p.channels * p.input[0] * p.input[1];
    const size_t outputs = p.batch * p.channels * p.output[0] * p.output[1];
    const size_t weights = p.batch * p.groups * p.kernel[0] * p.kernel[1] * p.output[0] * p.output[1];
    Array x(pixels), w(weights), g(outputs), y(outputs), gx(pixels), gw(weights);
    for (Array *array : {&x, &w, &g})
      for (double &value : *array) value = float(draw(-1000, 1000)) / 500;
    // Every other problem's kernels are generated, by a 1x1 convolution with or without bias.
    const int64_t in = p.input[0] * p.input[1], out = p.output[0] * p.output[1];
    const int64_t rows = p.groups * p.kernel[0] * p.kernel[1], reduced = draw(1, 20);
    Array r(p.batch * reduced * out), span(rows * reduced), bias(rows);
    for (Array *array : {&r, &span, &bias})
      for (double &value : *array) value = float(draw(-1000, 1000)) / 5000;
    const bool with_bias = draw(0, 1);
    if (k % 2)
      for (int64_t n = 0; n < p.batch; ++n)
        for (int64_t t = 0; t < rows; ++t)
          for (int64_t i = 0; i < out; ++i) {
            double &value = w[(n * rows + t) * out + i];
            value = with_bias ? bias[t] : 0;
            for (int64_t c = 0; c < reduced; ++c)
              value += span[t * reduced + c] * r[(n * reduced + c) * out + i];
          }
    for_each(p, [&](int64_t xi, int64_t wi, int64_t yi) {
      y[yi] += x[xi] * w[wi];
      gx[xi] += g[yi] * w[wi];
      gw[wi] += g[yi] * x[xi];
    });
    Problem last = p;
    last.channels_last = 1;
    const Array x_last = channels_last(x, p.batch, p.channels, in);
    const Array g_last = channels_last(g, p.batch, p.channels, out);
    const Array y_last = channels_last(y, p.batch, p.channels, out);
    bool good = passes(kForward, p, {x, w}, y) && passes(kGradInput, p, {g, w}, gx) &&
                passes(kGradWeight, p, {g, x}, gw) &&
                passes(kForward, last, {x_last, channels_last(w, p.batch, rows, out)}, y_last) &&
                passes(kGradInput, last, {g_last, w}, channels_last(gx, p.batch, p.channels, in)) &&
                passes(kGradWeight, last, {g_last, x_last}, gw);
    if (k % 2) {
      p.reduced = last.reduced = reduced;
      Inputs generated = {x, r, span}, generated_last = {x_last, channels_last(r, p.batch, reduced, out), span};
      if (with_bias) generated.push_back(bias), generated_last.push_back(bias);
      good = good && passes(kForward, p, generated, y) && passes(kForward, last, generated_last, y_last);
    }
    if (!good) {
      std::printf("problem %ld is wrong with %s: batch %ld channels %ld groups %ld", k,
                  involution_instruction_set(), long(p.batch), long(p.channels), long(p.groups));
      for (const int64_t *pair : {p.kernel, p.input, p.stride, p.padding, p.dilation})
        std::printf(" (%ld, %ld)", long(pair[0]), long(pair[1]));
      std::printf("\n");
      return 1;
    }
  }
  std::printf("%ld problems agree\n", problems);
  return 0;
}
