// Memory of large pages, for constant weights.
//
// Sparse reads jump from row to row, and with pages of 4 KiB every row costs walks of the page table: on the machines this
// was measured on a fifth of the bandwidth. ONNX Runtime maps weights from their file, where large pages cannot be had. The
// pages of the file are given back to the system, so that memory holds one copy.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>

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

}  // namespace trimtab
