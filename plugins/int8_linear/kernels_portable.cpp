#define TRIMTAB_WIDTH 4
#define TRIMTAB_ISA "portable"
#define TRIMTAB_KERNELS kInt8Portable
#include "kernels_impl.h"
