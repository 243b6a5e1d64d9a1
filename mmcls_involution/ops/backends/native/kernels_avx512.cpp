#ifdef __x86_64__
#ifdef __clang__  // which does not know the other
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#endif
#define ISA avx512
#define BYTES 64
#include "kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
