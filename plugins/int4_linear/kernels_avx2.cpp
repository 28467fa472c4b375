#define TRIMTAB_WIDTH 8
#define TRIMTAB_ISA "avx2"
#define TRIMTAB_KERNELS kInt4Avx2
#include "kernels_impl.h"
