#define TRIMTAB_WIDTH 16
#define TRIMTAB_ATTEND attend_avx512
#include "kernel.h"
