#include "kernels.h"

#include "isa.h"

namespace trimtab {

const Kernels& kernels() {
#if defined(TRIMTAB_X86)
  if (isa() >= Isa::avx512) return kAvx512;
  if (isa() >= Isa::avx2) return kAvx2;
#endif
  return kPortable;
}

}  // namespace trimtab
