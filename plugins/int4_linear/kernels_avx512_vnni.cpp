#define TRIMTAB_VNNI
#define TRIMTAB_WIDTH 16
#define TRIMTAB_ISA "avx512_vnni"
#define TRIMTAB_KERNELS kInt4Avx512Vnni
#include "kernels_impl.h"
