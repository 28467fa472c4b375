#define TRIMTAB_WIDTH 8
#define TRIMTAB_ISA "avx2"
#define TRIMTAB_KERNELS kAvx2
#define TRIMTAB_PACKED kPackedAvx2
#include "kernels_impl.h"
#include "packed_impl.h"
