#define TRIMTAB_WIDTH 4
#define TRIMTAB_ATTEND attend_portable
#include "kernel.h"
