#ifdef __x86_64__
#ifdef __clang__  // which does not know the other
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define ISA avx2
#define BYTES 32
#include "kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
