// Memory that is read from front to back is asked for before it is read.
#pragma once

#include <algorithm>
#include <cstdint>

namespace trimtab {
namespace {

// How far ahead memory is asked for, in bytes. Blocks of up to kShort bytes are over before the hardware foresees them: they are
// asked for by software, across the ends of blocks, for the second cache. (Blocks of 16 KB, two threads of a Zen 4: sums at 32
// GB/s, 25 for the first cache; products at 28, 23 without.) Of longer ones a token's sums are asked for in the first cache (52
// GB/s, 41 for the second, 45 without), and products only where the next block begins (57, 53 without, 37 for all of it). What
// is passed several times is asked for in the second cache, which holds it.
constexpr int64_t kShort = 1 << 16, kAhead = 1 << 13, kPassesAhead = 1 << 17, kBeginning = 1 << 11;

// Asks for memory that is read from front to back, line by line and `ahead` bytes in front; at its end for the beginning of what
// is read next. `near`: for the first cache, else for the second.
class Stream {
 public:
  Stream(int64_t ahead, bool near, const char* now, int64_t size, const char* next, int64_t next_size)
      : here_(now + std::min(size, ahead)), end_(now + size), next_(next), next_end_(next + std::min(next_size, ahead)), near_(near) {}

  // `lines` more. Inlined at once: GCC takes a function that only prefetches for one without effect, and drops it.
  __attribute__((always_inline)) void ask(int64_t lines) {
    for (; lines > 0; lines--, here_ += 64) {
      if (here_ >= end_) {
        if (next_ == nullptr) return;
        here_ = next_, end_ = next_end_, next_ = nullptr;
      }
      if (near_) __builtin_prefetch(here_, 0, 3);
      else __builtin_prefetch(here_, 0, 2);
    }
  }

 private:
  const char *here_, *end_, *next_, *next_end_;
  const bool near_;
};

// The same for blocks of `size` bytes, one after the other, for the second cache.
class BlockStream {
 public:
  // `left`: of blocks, whose places are blocks[i] * size behind `from`.
  BlockStream(const char* from, int64_t size, const int32_t* blocks, int64_t left) : from_(from), size_(size), blocks_(blocks), left_(left) {
    ask(kAhead / 64);
  }

  __attribute__((always_inline)) void ask(int64_t lines) {
    for (; lines > 0; lines--, here_ += 64) {
      if (here_ >= end_) {
        if (left_ == 0) return;
        here_ = from_ + *blocks_++ * size_, end_ = here_ + size_, left_--;
      }
      __builtin_prefetch(here_, 0, 2);
    }
  }

 private:
  const char *here_ = nullptr, *end_ = nullptr, *from_;
  int64_t size_;
  const int32_t* blocks_;
  int64_t left_;
};

}  // namespace
}  // namespace trimtab
