#include "kernels.h"

#include "isa.h"

namespace trimtab {
namespace {

[[maybe_unused]] Kernels with(Kernels kernels, const PackedKernels* packed) {
  kernels.packed = packed;
  return kernels;
}

Kernels choose() {
  switch (isa()) {
#if defined(TRIMTAB_X86)
    case Isa::avx512_vnni: return with(kAvx512, kPackedAvx512Vnni);
    case Isa::avx512: return with(kAvx512, kPackedAvx512);
#if defined(TRIMTAB_AVX_VNNI)
    case Isa::avx_vnni: return with(kAvx2, kPackedAvxVnni);
#endif
    case Isa::avx2: return with(kAvx2, kPackedAvx2);
#endif
    default: return kPortable;
  }
}

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace trimtab
