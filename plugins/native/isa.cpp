#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace trimtab {
namespace {

constexpr Isa kAll[] = {Isa::avx512_vnni, Isa::avx512, Isa::avx_vnni, Isa::avx2, Isa::portable};

bool supported([[maybe_unused]] Isa isa) {
#if defined(TRIMTAB_X86)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case Isa::avx512_vnni: return avx512 && __builtin_cpu_supports("avx512vnni");
    case Isa::avx512: return avx512;
#if defined(TRIMTAB_AVX_VNNI)
    case Isa::avx_vnni: return avx2 && __builtin_cpu_supports("avxvnni");
#else
    case Isa::avx_vnni: return false;  // the compiler has none
#endif
    case Isa::avx2: return avx2;
    default: break;
  }
#endif
  return isa == Isa::portable;
}

Isa choose() {
  const char* wanted = std::getenv("TRIMTAB_ISA");
  Isa highest = Isa::avx512_vnni;
  for (const Isa isa : kAll)
    if (wanted != nullptr && std::strcmp(wanted, isa_name(isa)) == 0) highest = isa;
  for (const Isa isa : kAll)
    if (isa <= highest && supported(isa)) return isa;
  return Isa::portable;
}

}  // namespace

const char* isa_name(Isa isa) {
  constexpr const char* names[] = {"portable", "avx2", "avx_vnni", "avx512", "avx512_vnni"};
  return names[static_cast<int>(isa)];
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace trimtab
