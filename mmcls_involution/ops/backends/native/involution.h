// C interface of the native CPU kernels. No torch header, so that one build
// serves every torch: tensors come in as pointers to contiguous memory.
#pragma once

#include <cstdint>

extern "C" {

// Sizes of one involution; pairs are (height, width). `reduced` is the number of channels
// that kernels are generated from, 0 where they are given.
struct Problem {
  int64_t batch, channels, groups, reduced, channels_last;
  int64_t kernel[2], input[2], output[2], stride[2], padding[2], dilation[2];
};

enum DType : int32_t { kFloat64, kFloat32, kFloat16, kBFloat16 };

enum Operation : int32_t { kForward, kGradInput, kGradWeight };

// torch_parallel_for of torch's stable C interface, or null for plain threads.
typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain,
                               void (*body)(int64_t, int64_t, void *), void *context);

// forward:     out[N,C,Ho,Wo]        from input, kernels
//              generated:             from input, reduced[N,R,Ho,Wo], span weight[G*Kh*Kw,R],
//              span bias[G*Kh*Kw] or null: kernels = span(reduced), never in memory as a whole
// grad_input:  out[N,C,H,W]          from output grad, kernels
// grad_weight: out[N,G,Kh,Kw,Ho,Wo]  from output grad, input
//
// With channels_last [N,C,H,W] lies in memory as [N,H,W,C], the reduced map likewise, and a
// forward operation's kernels as [N,Ho,Wo,G,Kh,Kw].
//
// Every element of `out` is written, in an order of summation that does not depend on the
// threads. `threads` counts where parallel_for is null. Returns 0, or 1 if the scratch
// memory could not be had.
__attribute__((visibility("default")))
int32_t involution(Operation operation, DType dtype, const Problem *problem,
                   const void *const inputs[4], void *out, ParallelFor parallel_for,
                   int32_t threads);

// The instruction set in use: "avx512", "avx2" or "baseline".
__attribute__((visibility("default")))
const char *involution_instruction_set();

// For tests: uses another one from now on. Returns 1 if this machine does not have it.
__attribute__((visibility("default")))
int32_t involution_use_instruction_set(const char *name);
}
