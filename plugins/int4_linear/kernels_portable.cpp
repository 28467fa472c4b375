#define TRIMTAB_WIDTH 4
#define TRIMTAB_ISA "portable"
#define TRIMTAB_KERNELS kInt4Portable
#include "kernels_impl.h"
