// A constant weight, copied once into memory of large pages.
//
// Sparse reads jump from row to row, and with pages of 4 KiB every row costs walks of the page table: on the machines this
// was measured on a fifth of the bandwidth. ONNX Runtime maps weights from their file, where large pages cannot be had. The
// pages of the file are given back to the system, so that memory holds one copy.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>

#include "custom_op.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace trimtab {

// Lets the system take the pages of a constant whose copy serves; they come again from the file if they are read.
inline void give_back([[maybe_unused]] const void* data, [[maybe_unused]] size_t size) {
#if defined(__linux__) && defined(MADV_PAGEOUT)
  constexpr uintptr_t kSmall = 1 << 12;
  const auto first = (reinterpret_cast<uintptr_t>(data) + kSmall - 1) / kSmall * kSmall;
  const auto last = (reinterpret_cast<uintptr_t>(data) + size) / kSmall * kSmall;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_PAGEOUT);
#endif
}

class Resident {
 public:
  // Takes the constant input `index` of a node, if it is one and large.
  void take(const ort::Runtime& runtime, const ort::KernelInfo* info, size_t index) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const ort::Value* value = runtime.constant_input(info, index);
    if (value == nullptr || std::getenv("TRIMTAB_SMALL_PAGES") != nullptr) return;
    Tensor tensor;
    tensor.rank = runtime.shape(value, &tensor.type, tensor.dims, Tensor::kMostDims);
    const size_t size = static_cast<size_t>(tensor.rows() * tensor.last()) * tensor.element_bytes();
    if (size < kPage) return;
    void* memory = std::aligned_alloc(kPage, (size + kPage - 1) / kPage * kPage);
    if (memory == nullptr) return;
    copy_.reset(memory);
    madvise(memory, size, MADV_HUGEPAGE);
    source_ = runtime.data(value);
    std::memcpy(memory, source_, size);
    give_back(source_, size);
#else
    (void)runtime, (void)info, (void)index;
#endif
  }

  // The copy of `tensor`, where it is the constant that was taken.
  Tensor of(Tensor tensor) const {
    if (copy_ != nullptr && tensor.data == source_) tensor.data = copy_.get();
    return tensor;
  }

 private:
  static constexpr size_t kPage = 1 << 21;

  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> copy_;
  const void* source_ = nullptr;
};

}  // namespace trimtab
