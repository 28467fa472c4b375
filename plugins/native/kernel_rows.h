// What the kernels of all formats share: rows, and asking for them ahead of time.
//
// A decoding step is bound by memory: each weight is read once. The rows that come next are asked for while the present ones
// are worked on, since the hardware cannot foresee what is chosen.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "vectors.h"

namespace trimtab {
namespace {

// Loops over rows and tokens of a tile are unrolled early, so that their sums are registers and not an array in memory.
#define TRIMTAB_UNROLL _Pragma("GCC unroll 8")
#define TRIMTAB_UNROLL_ALL _Pragma("GCC unroll 16")

struct Row {
  const char* data = nullptr;
  const float* scale = nullptr;  // int8: one; int4: one per block
};

template <int R>
struct Rows {
  Row row[R];
};

inline Row row_at(const Weights& w, int64_t row) {
  const int64_t scales = w.format == Format::int4 ? w.width / kInt4Block : 1;
  return {static_cast<const char*>(w.data) + row * bytes_of(w.format, w.width),
          w.scale == nullptr ? nullptr : w.scale + row * scales};
}

// R rows from i on; the last one again where there are no more.
template <int R>
Rows<R> find(const Weights& w, const Chosen& chosen, int64_t i, int64_t end) {
  Rows<R> found;
  TRIMTAB_UNROLL for (int r = 0; r < R; r++) found.row[r] = row_at(w, chosen.row(std::min(i + r, end - 1)));
  return found;
}

// The rows behind those from i on: of the same matrix, or the first of those that are wanted next.
template <int R>
Rows<R> find_next(const Weights& w, const Chosen& chosen, int64_t i, int64_t end, const Wanted& next) {
  if (i + R >= end && next.weights != nullptr) return find<R>(*next.weights, next.chosen, next.begin, next.end);
  return find<R>(w, chosen, std::min(i + R, end - 1), end);
}

// Asks for the next R rows, little by little, as the present ones are worked on. Neighbours are asked for one row after the
// other, which memory delivers faster than R streams at once; rows that lie apart, all at once (both measured on Zen 3).
//
// Calls of ask() are inlined at once: GCC takes a function that only prefetches for one without effect, and drops them.
template <int R, int64_t kBytes, bool kApart>
class Ahead {
 public:
  // `bytes` of each row, beginning `at` bytes into it, and `scales` of its scales.
  Ahead(const Rows<R>& rows, int64_t at, int64_t bytes, int64_t scales)
      : rows_(rows), at_(at), bytes_(bytes), scales_(scales), near_(R < 4 && bytes < kNear) {
    for (int r = kApart ? R - 1 : 0; r >= 0; r--) begin(r);
  }

  // For every kBytes that are worked on, of all R rows together.
  __attribute__((always_inline)) inline void ask() {
    if constexpr (kApart) {
      constexpr int64_t kEach = kBytes / R;
      if (kEach >= 64 || (at_ & 63) < kEach)
        TRIMTAB_UNROLL for (int r = 0; r < R; r++)
          for (int64_t line = 0; line < kEach; line += 64) fetch(rows_.row[r].data + at_ + line);
      at_ += kEach;
    } else {
      TRIMTAB_UNROLL for (int64_t line = 0; line < kBytes; line += 64) fetch(here_ + line);
      here_ += kBytes;
      if (here_ >= end_ && ++row_ < R) begin(row_);
    }
  }

 private:
  // Many rows, or long ones, would push each other out of the first cache, whose sets their places share; and fewer lines can
  // be on their way to it than to the second.
  __attribute__((always_inline)) inline void fetch(const char* p) const {
    if (near_) __builtin_prefetch(p, 0, 3);
    else __builtin_prefetch(p, 0, 2);
  }

  __attribute__((always_inline)) inline void begin(int row) {
    here_ = rows_.row[row].data + at_;
    end_ = here_ + bytes_;
    for (int64_t i = 0; i < scales_; i += 16) __builtin_prefetch(rows_.row[row].scale + i, 0, 3);
  }

  static constexpr int64_t kNear = 2048;  // bytes of a row from which on it is long

  const Rows<R>& rows_;
  int64_t at_;
  const int64_t bytes_, scales_;
  const bool near_;
  const char *here_, *end_;
  int row_ = 0;
};

// Asks for the beginnings of the next rows; of long ones the hardware foresees the rest.
template <int R>
__attribute__((always_inline)) inline void ask_beginnings(const Rows<R>& next, int64_t at) {
  TRIMTAB_UNROLL for (int r = 0; r < R; r++)
    TRIMTAB_UNROLL for (int64_t line = 0; line < 256; line += 64) __builtin_prefetch(next.row[r].data + at + line, 0, 2);
}

}  // namespace
}  // namespace trimtab
