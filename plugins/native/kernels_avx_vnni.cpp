#define TRIMTAB_VNNI
#define TRIMTAB_WIDTH 8
#define TRIMTAB_BYTES kBytesAvxVnni
#include "bytes_impl.h"
