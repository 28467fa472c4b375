#include "../native/isa.h"
#include "attend.h"

namespace trimtab {

void attend(const AttentionPart& part) {
#if defined(TRIMTAB_X86)
  if (isa() >= Isa::avx512) return attend_avx512(part);
  if (isa() >= Isa::avx2) return attend_avx2(part);
#endif
  attend_portable(part);
}

}  // namespace trimtab
