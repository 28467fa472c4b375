#define TRIMTAB_VNNI
#define TRIMTAB_WIDTH 16
#define TRIMTAB_BYTES kBytesAvx512Vnni
#include "bytes_impl.h"
