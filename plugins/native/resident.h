// A constant weight, copied once into memory of large pages, and there packed as kernels want it.
//
// Sparse reads jump from row to row, and with pages of 4 KiB every row costs walks of the page table: on the machines this
// was measured on a fifth of the bandwidth. ONNX Runtime maps weights from their file, where large pages cannot be had. The
// pages of the file are given back to the system, so that memory holds one copy.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>

#include "custom_op.h"
#include "kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace trimtab {

constexpr size_t kLargePage = 1 << 21;
constexpr size_t kWorthCopying = 1 << 16;  // bytes

// Lets the system take the pages of a constant whose copy serves; they come again from the file if they are read.
inline void give_back([[maybe_unused]] const void* data, [[maybe_unused]] size_t size) {
#if defined(__linux__) && defined(MADV_PAGEOUT)
  constexpr uintptr_t kSmall = 1 << 12;
  const auto first = (reinterpret_cast<uintptr_t>(data) + kSmall - 1) / kSmall * kSmall;
  const auto last = (reinterpret_cast<uintptr_t>(data) + size) / kSmall * kSmall;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_PAGEOUT);
#endif
}

using Memory = std::shared_ptr<void>;

// Whole large pages; nullptr if there is no memory.
inline Memory large_pages(size_t size) {
  Memory memory(std::aligned_alloc(kLargePage, (size + kLargePage - 1) / kLargePage * kLargePage), std::free);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (memory != nullptr && std::getenv("TRIMTAB_SMALL_PAGES") == nullptr) madvise(memory.get(), size, MADV_HUGEPAGE);
#endif
  return memory;
}

// For one weight. Those smaller than a large page share some: a step of a decoder reads many of them, one after the other, and
// each in small pages of its own begins slowly. nullptr if there is no memory.
inline Memory large_memory(size_t size) {
  constexpr size_t kLine = 64, kShared = 4 * kLargePage;
  size = (size + kLine - 1) / kLine * kLine;
  if (size >= kLargePage) return large_pages(size);
  if (size < kWorthCopying) return Memory(std::aligned_alloc(kLine, size), std::free);
  static std::mutex mutex;
  static std::weak_ptr<void> shared;
  static size_t used = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  Memory pages = shared.lock();
  if (pages == nullptr || used + size > kShared) {
    if ((pages = large_pages(kShared)) == nullptr) return nullptr;
    shared = pages, used = 0;
  }
  Memory piece(pages, static_cast<char*>(pages.get()) + used);
  used += size;
  return piece;
}

class Resident {
 public:
  using Pack = decltype(ByteKernels::pack_up) ByteKernels::*;  // one of those

  // Takes the constant input `index` of a node, if it is one: packed where it is int8 [rows, width] of blocks that the processor's
  // kernels pack; else as it is where it is large.
  void take(const ort::Runtime& runtime, const ort::KernelInfo* info, size_t index, Pack pack = nullptr, int64_t block = 1) {
    const Tensor tensor = tensor_of(runtime, runtime.constant_input(info, index));
    if (!tensor) return;
    const ByteKernels* bytes = kernels().bytes;
    packed_ = pack != nullptr && bytes != nullptr && tensor.type == ort::Type::int8 && tensor.rank == 2 && block > 0 && block % kBytesBlock == 0 &&
              tensor.dims[0] % block == 0 && tensor.dims[1] % kBytesWidth == 0;
    const size_t size = static_cast<size_t>(tensor.rows() * tensor.last()) * tensor.element_bytes();
    const bool wanted = packed_ ? size > 0 : kCopies && size >= kWorthCopying && std::getenv("TRIMTAB_SMALL_PAGES") == nullptr;
    if (!wanted || (copy_ = large_memory(size)) == nullptr) return;
    source_ = tensor.data;
    if (packed_)
      (bytes->*pack)(static_cast<const int8_t*>(source_), tensor.dims[0], tensor.dims[1], block, static_cast<char*>(copy_.get()));
    else std::memcpy(copy_.get(), source_, size);
    if (size >= kWorthCopying) give_back(source_, size);
  }

  // The copy of `tensor`, where it is the constant that was taken as it is.
  Tensor of(Tensor tensor) const {
    if (took(tensor) && !packed_) tensor.data = copy_.get();
    return tensor;
  }

  // Of `tensor` packed; nullptr if it is not.
  const char* packed(const Tensor& tensor) const { return took(tensor) && packed_ ? static_cast<const char*>(copy_.get()) : nullptr; }

 private:
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  static constexpr bool kCopies = true;
#else
  static constexpr bool kCopies = false;
#endif

  bool took(const Tensor& tensor) const { return copy_ != nullptr && tensor.data == source_; }

  Memory copy_;
  const void* source_ = nullptr;
  bool packed_ = false;
};

}  // namespace trimtab
