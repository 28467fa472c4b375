#define TRIMTAB_WIDTH 8
#define TRIMTAB_ATTEND attend_avx2
#include "kernel.h"
