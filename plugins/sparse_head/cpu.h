// SparseHead on the CPU: exact logits of candidate rows of the vocabulary, which are blocks of one row without activation.
#pragma once

#include "../sparse_up/cpu.h"

namespace trimtab {

struct SparseHead : SparseUp {
  static constexpr const char* kName = "SparseHead";
  static constexpr ort::Argument kInputs[] = {{}, {}, {}, kOptional, kOptional};  // x, rows, weight, scale, bias

  const char* read(const ort::Runtime& runtime, const ort::KernelInfo* info) {
    inputs.take(runtime, info, 5);
    resident_up.take(runtime, info, 2);
    return nullptr;
  }
};

inline const Registered<SparseHead> kSparseHead;

}  // namespace trimtab
