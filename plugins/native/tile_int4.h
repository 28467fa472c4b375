// Products of tokens with int4 weights of a block, of which activations are two bytes each: 16 bits as elsewhere.
//
// Weights are unsigned, with a zero of 8, which their activations alone take off. Within 32 inputs, or up to 32 rows, sums are
// exact integers.
#pragma once

#include "int4_sums.h"
#include "stream.h"
#include "tile_int8.h"

namespace trimtab {
namespace {

constexpr int kInt4Largest = 127 * 257;  // that two bytes hold, whose high ones count 256 times
constexpr int kInt4Vectors = 64 / (4 * V);  // of 64 bytes

// What 32 inputs of a row have in common.
struct Int4Scale {
  float scale;
  int32_t less;  // -8 times their sum
};

inline vi low_nibbles(vi both) { return both & 0x0f0f0f0f; }
inline vi high_nibbles(vi both) { return (both >> 4) & 0x0f0f0f0f; }

// Each of the first V / 2 elements twice.
template <int... J>
inline vf twice(vf v, std::integer_sequence<int, J...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(v, v, (J / 2)...);
#else
  return __builtin_shuffle(v, vi{(J / 2)...});
#endif
}

// out[t][r] = x[t] times row r of a panel, of V rows or (kHalf) V / 2. `integers`: of each 32 columns, vectors with four (eight)
// columns of each row in the low halves of the bytes and, 16 behind, as many in the high ones. x[t]: high bytes, low bytes and
// Int4Scales of all columns.
template <int T, bool kHalf, bool kShort>
void dot_int4(const char* scales, const char* integers, int64_t width, const char* const* x, float* const* out, Stream& ahead,
              int64_t lines) {
  constexpr int kRows = kHalf ? V / 2 : V, kLoads = kHalf ? 2 : 4, kColumns = 16 / kLoads;
  vf sums[T] = {};
  for (int64_t at = 0; at < width; at += kInt4Block, integers += kLoads * 4 * V, scales += kRows * (kShort ? 2 : 4)) {
    ahead.ask(lines);
    vi w[2 * kLoads];
    TRIMTAB_UNROLL for (int l = 0; l < kLoads; l++) {
      const vi both = load<vi>(integers + l * 4 * V);
      w[l] = low_nibbles(both), w[kLoads + l] = high_nibbles(both);
    }
    vf scale = load_scales<kShort>(scales);
    if (kHalf) scale = twice(scale, std::make_integer_sequence<int, V>());
    TRIMTAB_UNROLL for (int t = 0; t < T; t++) {
      const auto mine = load<Int4Scale>(x[t] + 2 * width + at / kInt4Block * sizeof(Int4Scale));
      Int4Sums high(0), low(kHalf ? mine.less / 2 : mine.less);  // half of it in each of two elements
      TRIMTAB_UNROLL for (int l = 0; l < 2 * kLoads; l++) {
        const char* from = x[t] + at + l * kColumns;
        const auto by = [&](const char* p) { return kHalf ? (vi)(vl{} + load<int64_t>(p)) : vi{} + load<int32_t>(p); };
        high.add(w[l], by(from));
        low.add(w[l], by(from + width));
      }
      sums[t] += __builtin_convertvector((high.total() << 8) + low.total(), vf) * scale * mine.scale;
    }
  }
  TRIMTAB_UNROLL for (int t = 0; t < T; t++) {
    if (!kHalf) store(out[t], sums[t]);
    else
      for (int r = 0; r < kRows; r++) out[t][r] = sums[t][2 * r] + sums[t][2 * r + 1];
  }
}

// Up to kChunk rows of a weight, of one block or several small ones: of each its scales, and of each four of them the integers,
// 64 bytes for 32 columns, with columns 0 to 15 in the low halves of the bytes and 16 to 31 in the high ones.
struct Int4Chunk {
  int64_t rows = 0;
  int64_t step;  // bytes of integers from 32 columns to the next
  const char* scales[kChunk];
  const char* integers[kChunk / 4];

  explicit Int4Chunk(int64_t step) : step(step) {}

  void add(int64_t count, const char* row_scales, int64_t stride, const char* fours) {
    for (int64_t r = 0; r < count; r += 4, fours += 64) integers[(rows + r) / 4] = fours;
    for (int64_t r = 0; r < count; r++) scales[rows + r] = row_scales + r * stride;
    rows += count;
  }
};

// h of a chunk's rows times their scales of V blocks of 32 columns, each rounded to two bytes of the largest of its block.
struct Int4Factors {
  int32_t high[kChunk / 4][V], low[kChunk / 4][V];  // of four rows, by block
  int32_t less[V];                                  // -8 times their sum
  float step[V];

  // `block`: the first one's number.
  template <bool kShort>
  void round(const Int4Chunk& chunk, int64_t block, const float* h) {
    const int64_t at = block * (kShort ? 2 : 4);
    vf factors[kChunk], most = {}, spoilt = {};  // times 0: NaN where one is not finite
    for (int64_t r = 0; r < chunk.rows; r++) {
      factors[r] = h[r] * load_scales<kShort>(chunk.scales[r] + at);
      most = larger(most, magnitude(factors[r])), spoilt += factors[r] * 0.0f;
    }
    const vf inverse = most < 0x1p-100f ? vf{} : kInt4Largest / most;
    vu all = {};  // behind the end of a row factors are anything, and nothing reads what comes of them
    for (int64_t r = 0; r < chunk.rows; r += 4) {
      vi highs = {}, lows = {};
      TRIMTAB_UNROLL for (int i = 0; i < 4; i++) {
        const vu v = (vu)round_to_integers(factors[r + i] * inverse);
        all += v;
        highs |= (((vi)(v + 128) >> 8) & 255) << 8 * i, lows |= ((vi)v & 255) << 8 * i;
      }
      std::memcpy(high[r / 4], &highs, sizeof highs), std::memcpy(low[r / 4], &lows, sizeof lows);
    }
    all *= -8u;
    const vf steps = most / kInt4Largest + spoilt;
    std::memcpy(less, &all, sizeof all), std::memcpy(step, &steps, sizeof steps);
  }
};

// y += what the rows of a chunk have of 32 columns, those of number `block`, and number j of those that were rounded.
inline void sum_int4(const Int4Chunk& chunk, int64_t block, const Int4Factors& by, int64_t j, float* y) {
  TRIMTAB_UNROLL for (int l = 0; l < kInt4Vectors; l++) {
    const int64_t at = block * chunk.step + l * 4 * V;
    Int4Sums high[2] = {Int4Sums(0), Int4Sums(0)}, low[2] = {Int4Sums(by.less[j]), Int4Sums(by.less[j])};
    for (int64_t q = 0; q < chunk.rows / 4; q++) {
      const vi both = load<vi>(chunk.integers[q] + at), first = low_nibbles(both), second = high_nibbles(both);
      const vi highs = vi{} + by.high[q][j], lows = vi{} + by.low[q][j];
      high[0].add(first, highs), low[0].add(first, lows);
      high[1].add(second, highs), low[1].add(second, lows);
    }
    TRIMTAB_UNROLL for (int half = 0; half < 2; half++) {
      float* to = y + 16 * half + l * V;
      store(to, load<vf>(to) + __builtin_convertvector((high[half].total() << 8) + low[half].total(), vf) * by.step[j]);
    }
  }
}

}  // namespace
}  // namespace trimtab
