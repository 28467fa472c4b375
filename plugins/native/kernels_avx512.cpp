#define TRIMTAB_WIDTH 16
#define TRIMTAB_ISA "avx512"
#define TRIMTAB_KERNELS kAvx512
#define TRIMTAB_PACKED kPackedAvx512
#include "kernels_impl.h"
#include "packed_impl.h"
