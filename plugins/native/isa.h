// The instruction sets that kernels are compiled for, in ascending order.
#pragma once

namespace trimtab {

enum class Isa { portable, avx2, avx_vnni, avx512, avx512_vnni };

// The highest that this processor runs, and that TRIMTAB_ISA allows, which tests set to the name of one.
Isa isa();

const char* isa_name(Isa isa);

}  // namespace trimtab
