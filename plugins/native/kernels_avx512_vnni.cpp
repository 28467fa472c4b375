#define TRIMTAB_VNNI
#define TRIMTAB_WIDTH 16
#define TRIMTAB_PACKED kPackedAvx512Vnni
#include "packed_impl.h"
