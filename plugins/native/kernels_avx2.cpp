#define TRIMTAB_WIDTH 8
#define TRIMTAB_ISA "avx2"
#define TRIMTAB_KERNELS kAvx2
#define TRIMTAB_BYTES kBytesAvx2
#include "kernels_impl.h"
#include "bytes_impl.h"
