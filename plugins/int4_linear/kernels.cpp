#include "kernels.h"

#include "../native/isa.h"

namespace trimtab {

const Int4Kernels& int4_kernels() {
  switch (isa()) {
#if defined(TRIMTAB_X86)
    case Isa::avx512_vnni: return kInt4Avx512Vnni;
    case Isa::avx512: return kInt4Avx512;
#if defined(TRIMTAB_AVX_VNNI)
    case Isa::avx_vnni: return kInt4AvxVnni;
#endif
    case Isa::avx2: return kInt4Avx2;
#endif
    default: return kInt4Portable;
  }
}

}  // namespace trimtab
