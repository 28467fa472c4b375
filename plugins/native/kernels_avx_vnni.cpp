#define TRIMTAB_VNNI
#define TRIMTAB_WIDTH 8
#define TRIMTAB_PACKED kPackedAvxVnni
#include "packed_impl.h"
