// Rows that several tokens take, in chunks that the caches hold while they are multiplied with one tile of tokens after the
// other. In that time the rows that are wanted next are asked for.
#pragma once

#include "kernel_rows.h"
#include "vector_math.h"

namespace trimtab {
namespace {

constexpr int kDotRows = 4, kDotTokens = V == 16 ? 6 : 3;  // of a tile of `dot`: as many sums as there are registers for
constexpr int kSumTokens = 6;                               // of a tile of `sum`
constexpr int64_t kSumUnit = 1024;                          // columns of y that are added at a time, at least
constexpr int64_t kSumFloats = 1 << 16;                     // of y that stay in the second cache while all rows are added

// Rows that are worked on together; the last again up to whole tiles.
struct Chunk {
  const Weights* w = nullptr;
  int64_t count = 0;
  Row row[kChunk];

  Chunk() = default;
  Chunk(const Weights* weights, const Chosen& chosen, int64_t begin, int64_t end) : w(weights), count(std::min(kChunk, end - begin)) {
    for (int64_t i = 0; i < tiled(); i++)
      row[i] = row_at(*w, chosen.row(begin + std::min(i, count - 1)));
  }

  // Rows with those that fill the last tile.
  int64_t tiled() const { return (count + kDotRows - 1) / kDotRows * kDotRows; }
};

// Asks for the rows of a chunk line by line, one row after the other: evenly, so that memory is never idle while rows are
// worked on, and never waited for.
class Lines {
 public:
  Lines(const Chunk& chunk, int64_t first, int64_t size)
      : rows_(chunk.row), left_(chunk.count), at_(left_ == 0 ? 0 : bytes_of(chunk.w->format, first)),
        bytes_(left_ == 0 ? 0 : bytes_of(chunk.w->format, size)) {
    if (left_ > 0) begin();
  }

  // `lines` more. Inlined at once: GCC takes a function that only prefetches for one without effect, and drops it.
  __attribute__((always_inline)) void ask(int64_t lines) {
    for (; lines > 0 && left_ > 0; lines--) {
      __builtin_prefetch(here_, 0, 2);
      here_ += 64;
      if (here_ < end_) continue;
      rows_++;
      if (--left_ > 0) begin();
    }
  }

 private:
  __attribute__((always_inline)) void begin() {
    here_ = rows_->data + at_;
    end_ = here_ + bytes_;
  }

  const Row* rows_;
  int64_t left_;
  const int64_t at_, bytes_;
  const char *here_ = nullptr, *end_ = nullptr;
};

// Lines to ask for with a step that reads so many bytes, where the same rows pass so many times.
inline int64_t lines_in(int64_t bytes, int64_t passes) { return (bytes + 64 * passes - 1) / (64 * passes); }

// What follows a chunk: more of the same rows, else those that are wanted next.
inline Chunk behind(const Weights& w, const Chosen& chosen, int64_t i, int64_t end, const Wanted& next) {
  if (i + kChunk < end) return Chunk(&w, chosen, i + kChunk, end);
  return next.weights == nullptr ? Chunk() : Chunk(next.weights, next.chosen, next.begin, next.end);
}

// Calls use(b, i, now, next) for the chunks of each block, i from its first row on.
template <typename Use>
void each_chunk(const Weights& w, const Takers& takers, const Use& use) {
  for (int64_t b = 0; b < takers.count; b++)
    for (int64_t i = 0; i < takers.size; i += kChunk) {
      const Chosen block{takers.blocks + b, takers.size};
      const Wanted next = b + 1 < takers.count ? Wanted{&w, {takers.blocks + b + 1, takers.size}, 0, takers.size} : Wanted{};
      use(b, i, Chunk(&w, block, i, takers.size), behind(w, block, i, takers.size, next));
    }
}

// Of each of four vectors the sum of its elements, in the first four places; `Vector` is vf or vi.
template <typename Vector>
inline Vector totals(Vector a, Vector b, Vector c, Vector d) {
  constexpr auto kLanes = std::make_integer_sequence<int, V>();
  const auto add = [&](auto step, Vector p, Vector q) {
    constexpr int kStep = decltype(step)::value;
    return (Vector)exchange<kStep, false>((vf)p, (vf)q, kLanes) + (Vector)exchange<kStep, true>((vf)p, (vf)q, kLanes);
  };
  Vector sum = add(Number<2>(), add(Number<1>(), a, b), add(Number<1>(), c, d));
  if constexpr (V > 8) sum += (Vector)neighbours<8>((vf)sum, kLanes);
  if constexpr (V > 4) sum += (Vector)neighbours<4>((vf)sum, kLanes);
  return sum;
}

typedef float four __attribute__((vector_size(16)));

// Writes, or adds, a tile's sums of one token to `count` outputs, of which the first four are its.
inline void put_down(four made, bool fresh, int64_t count, float* to) {
  static_assert(kDotRows == 4, "a vector of four");
  if (count >= kDotRows) {
    if (!fresh) made += load<four>(to);
    std::memcpy(to, &made, sizeof made);
    return;
  }
  for (int64_t q = 0; q < count; q++) to[q] = fresh ? made[q] : to[q] + made[q];
}

// How many columns of so many tokens' sums are added at a time: memory delivers rows best that are read whole.
inline int64_t sum_strip(int64_t tokens) { return std::max<int64_t>(1, kSumFloats / kSumUnit / tokens) * kSumUnit; }

// Calls use(first, tile) for tiles of about the same height, of at most `most` tokens, that make up `tokens`.
template <typename Use>
void in_tiles(int64_t tokens, int64_t most, const Use& use) {
  const int64_t tiles = (tokens + most - 1) / most;
  for (int64_t i = 0; i < tiles; i++) use(tokens * i / tiles, tokens * (i + 1) / tiles - tokens * i / tiles);
}

}  // namespace
}  // namespace trimtab
