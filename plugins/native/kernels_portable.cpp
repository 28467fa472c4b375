#define TRIMTAB_WIDTH 4
#define TRIMTAB_ISA "portable"
#define TRIMTAB_KERNELS kPortable
#include "kernels_impl.h"
