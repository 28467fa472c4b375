#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace trimtab {
namespace {

const Kernels& choose() {
#if defined(TRIMTAB_X86)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  const char* wanted = std::getenv("TRIMTAB_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  if (avx512 && (any || std::strcmp(wanted, "avx512") == 0)) return kAvx512;
  if (avx2 && (any || std::strcmp(wanted, "portable") != 0)) return kAvx2;
#endif
  return kPortable;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace trimtab
