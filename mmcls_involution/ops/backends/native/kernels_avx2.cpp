#ifdef __x86_64__
#pragma GCC target("avx2,fma")
#define ISA avx2
#define BYTES 32
#include "kernels.h"
#endif
