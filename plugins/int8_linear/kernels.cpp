#include "kernels.h"

#include "../native/isa.h"

namespace trimtab {

const Int8Kernels& int8_kernels() {
  switch (isa()) {
#if defined(TRIMTAB_X86)
    case Isa::avx512_vnni: return kInt8Avx512Vnni;
    case Isa::avx512: return kInt8Avx512;
#if defined(TRIMTAB_AVX_VNNI)
    case Isa::avx_vnni: return kInt8AvxVnni;
#endif
    case Isa::avx2: return kInt8Avx2;
#endif
    default: return kInt8Portable;
  }
}

}  // namespace trimtab
