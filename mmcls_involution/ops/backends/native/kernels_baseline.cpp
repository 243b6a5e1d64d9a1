#define ISA baseline
#define BYTES 16
#include "kernels.h"
