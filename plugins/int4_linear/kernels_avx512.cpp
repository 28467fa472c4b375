#define TRIMTAB_WIDTH 16
#define TRIMTAB_ISA "avx512"
#define TRIMTAB_KERNELS kInt4Avx512
#include "kernels_impl.h"
