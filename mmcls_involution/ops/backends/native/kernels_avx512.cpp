#ifdef __x86_64__
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#define ISA avx512
#define BYTES 64
#include "kernels.h"
#endif
