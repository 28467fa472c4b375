#include "kernels.h"

#include "isa.h"

namespace trimtab {
namespace {

[[maybe_unused]] Kernels with(Kernels kernels, const ByteKernels& bytes) {
  kernels.bytes = &bytes;
  return kernels;
}

Kernels choose() {
  switch (isa()) {
#if defined(TRIMTAB_X86)
    case Isa::avx512_vnni: return with(kAvx512, kBytesAvx512Vnni);
    case Isa::avx512: return with(kAvx512, kBytesAvx512);
#if defined(TRIMTAB_AVX_VNNI)
    case Isa::avx_vnni: return with(kAvx2, kBytesAvxVnni);
#endif
    case Isa::avx2: return with(kAvx2, kBytesAvx2);
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
