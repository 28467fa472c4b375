#define TRIMTAB_VNNI
#define TRIMTAB_WIDTH 8
#define TRIMTAB_ISA "avx_vnni"
#define TRIMTAB_KERNELS kInt4AvxVnni
#include "kernels_impl.h"
