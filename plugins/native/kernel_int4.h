// Weights of int4 in blocks of 32, each with its scale: products of 16-bit integers in pairs, which are exact within a block.
//
// 16 bits hold four weights of a row, which shifts and masks part. A vector holds V / 4 blocks, one to every 128 bits, and
// four vectors are a set: V blocks, whose scales are one vector. The zero point is taken off a block at a time: the sum of
// x (q - 8) is that of x q, less 8 times that of x. Of every 8 V places, x has those first that are the first of their four,
// then the second ones, and so on. A row's last blocks that are no whole set are copied, and zeros added.
#pragma once

#include "kernel_rows.h"

namespace trimtab {
namespace {

// Weight n of every four, as 16-bit integers from 0 to 15.
template <int n>
vs nibble(vs w) {
  return n == 3 ? (vs)((vw)w >> 12) : (w >> 4 * n) & 15;
}

struct Int4Kernel {
  static constexpr int64_t kVector = 8 * V, kSet = 4 * kVector;  // places
  static constexpr int kDotRows = 2, kDotRowsApart = 4, kSumRows = 8;

  static void split(const int16_t* from, int16_t* to) {
    for (int64_t i = 0; i < kGroup; i += kVector)
      for (int n = 0; n < 4; n++)
        for (int j = 0; j < 2 * V; j++) to[i + n * 2 * V + j] = from[i + 4 * j + n];
  }

  // out[t][r] = x[t] . row[r], for T tokens.
  template <int T, int R, bool kApart>
  static void dot(const Rows<R>& now, const Rows<R>& next, int64_t width, const Activations& x, float out[T][R]) {
    const int64_t whole = width / kSet * kSet, groups = x.step * groups_of(width);  // of x, from token to token
    Ahead<R, R * kVector / 2, kApart> ahead(next, 0, width / 2, width / kInt4Block);
    vf sums[T][R] = {};
    for (int64_t group = 0, i = 0; i < width; group++) {
      vf parts[T][R] = {};
      for (const int64_t end = std::min(whole, (group + 1) * kGroup); i < end; i += kSet)
        dot_set<T>(now, i, x.at(i), groups, ahead, parts);
      if (i == whole && i < std::min(width, (group + 1) * kGroup)) {
        dot_set<T>(Filled<R>(now, i, width).rows, 0, x.at(i), groups, ahead, parts);
        i = width;
      }
      TRIMTAB_UNROLL for (int t = 0; t < T; t++)
        TRIMTAB_UNROLL for (int r = 0; r < R; r++) sums[t][r] += parts[t][r] * x.scale[t * groups + group];
    }
    TRIMTAB_UNROLL for (int t = 0; t < T; t++)
      TRIMTAB_UNROLL for (int r = 0; r < R; r++) out[t][r] = total(sums[t][r]);
  }

  // y[j] += sum over r of h[r] * row[r][first + j], for j in [0, size). h times the scales of a block is rounded to 16 bits
  // of the largest among the rows. Whole sets of y have their places in another order, which `order` undoes.
  template <bool kApart>
  static void sum(const Rows<kSumRows>& now, const Rows<kSumRows>& next, const float* h, int64_t first, int64_t size,
                  float* y) {
    Ahead<kSumRows, kSumRows * kVector / 2, kApart> ahead(next, first / 2, size / 2, (first + size) / kInt4Block);
    int64_t j = 0;
    for (; j + kSet <= size; j += kSet) sum_set(now, first + j, h, ahead, y + j);
    if (j == size) return;
    float last[kSet] = {};
    sum_set(Filled<kSumRows>(now, first + j, first + size).rows, 0, h, ahead, last);
    order(last, kSet);
    for (int64_t i = j; i < size; i++) y[i] += last[i - j];
  }

  // Of each vector: blocks of 32 places, of which four vectors hold every fourth place of either half.
  static void order(float* y, int64_t size) {
    float mixed[kVector];
    for (int64_t j = 0; j < size / kSet * kSet; j += kVector) {
      std::copy_n(y + j, kVector, mixed);
      for (int lane = 0; lane < V / 4; lane++)
        for (int n = 0; n < 8; n++)
          for (int i = 0; i < 4; i++) y[j + lane * 32 + n / 4 * 16 + 4 * i + n % 4] = mixed[n * V + lane * 4 + i];
    }
  }

 private:
  // What rows hold from place `begin` to `end`, less than a set, and zeros behind.
  template <int R>
  struct Filled {
    char data[R][kSet / 2] = {};
    float scale[R][V] = {};
    Rows<R> rows;

    Filled(const Rows<R>& from, int64_t begin, int64_t end) {
      for (int r = 0; r < R; r++) {
        std::copy(from.row[r].data + begin / 2, from.row[r].data + end / 2, data[r]);
        std::copy(from.row[r].scale + begin / kInt4Block, from.row[r].scale + end / kInt4Block, scale[r]);
        rows.row[r] = {data[r], scale[r]};
      }
    }
  };

  // The set at place i of the rows with x at its place; of x, `groups` lie from token to token.
  template <int T, int R, typename Next>
  __attribute__((always_inline)) static inline void dot_set(const Rows<R>& rows, int64_t i, const Activations& x,
                                                            int64_t groups, Next& ahead, vf parts[T][R]) {
    vf scale[R];
    TRIMTAB_UNROLL for (int r = 0; r < R; r++) scale[r] = load<vf>(rows.row[r].scale + i / kInt4Block);
    TRIMTAB_UNROLL for (int t = 0; t < T; t++) {
      const vf less = load<vf>(x.less + t * groups * (kGroup / kInt4Block));
      TRIMTAB_UNROLL for (int r = 0; r < R; r++) parts[t][r] += scale[r] * less;
    }
    const auto vector = [&](auto q) __attribute__((always_inline)) {
      ahead.ask();
      TRIMTAB_UNROLL for (int r = 0; r < R; r++) {
        const vs w = load<vs>(rows.row[r].data + (i + q.value * kVector) / 2);
        const vf each = spread<q.value>(scale[r]);
        TRIMTAB_UNROLL for (int t = 0; t < T; t++) {
          const int16_t* at = x.integers + t * groups * kGroup + q.value * kVector;
          vi sum = multiply_pairs(nibble<0>(w), load<vs>(at)) + multiply_pairs(nibble<1>(w), load<vs>(at + 2 * V));
          sum += multiply_pairs(nibble<2>(w), load<vs>(at + 4 * V)) + multiply_pairs(nibble<3>(w), load<vs>(at + 6 * V));
          parts[t][r] += __builtin_convertvector(sum, vf) * each;
        }
      }
    };
    vector(Number<0>()), vector(Number<1>()), vector(Number<2>()), vector(Number<3>());
  }

  // y += the set at place i of the rows, times h.
  template <typename Next>
  __attribute__((always_inline)) static inline void sum_set(const Rows<kSumRows>& rows, int64_t i, const float* h,
                                                            Next& ahead, float* y) {
    vf factor[kSumRows], most = {}, spoilt = {};  // times 0: NaN where one is not finite
    TRIMTAB_UNROLL for (int r = 0; r < kSumRows; r++) {
      factor[r] = h[r] * load<vf>(rows.row[r].scale + i / kInt4Block);
      most = larger(most, magnitude(factor[r]));
      spoilt += factor[r] * 0.0f;
    }
    const vf step = most / 32767 + spoilt, inverse = 32767 / larger(most, vf{} + 1e-30f);
    vi pair[kSumRows / 2], all = {};
    TRIMTAB_UNROLL for (int p = 0; p < kSumRows / 2; p++) {
      const vi a = round_to_integers(factor[2 * p] * inverse), b = round_to_integers(factor[2 * p + 1] * inverse);
      all += a + b;
      pair[p] = (a & 0xffff) | (b << 16);
    }
    all *= -8;
    const auto vector = [&](auto q) __attribute__((always_inline)) {
      ahead.ask();
      const int64_t at = (i + q.value * kVector) / 2;
      const vf each = spread<q.value>(step);
      const vi less = (vi)spread<q.value>((vf)all);
      TRIMTAB_UNROLL for (int half = 0; half < 2; half++) {
        // The middle two of four keep their place within 16 bits, and count 16 and 256 times as much.
        vi sums[4] = {less, less << 4, less << 8, less};
        TRIMTAB_UNROLL for (int p = 0; p < kSumRows / 2; p++) {
          const vs a = load<vs>(rows.row[2 * p].data + at), b = load<vs>(rows.row[2 * p + 1].data + at);
          const vs w = half == 0 ? interleave_low(a, b) : interleave_high(a, b);
          const vs by = (vs)spread<q.value>((vf)pair[p]);
          sums[0] += multiply_pairs(w & 0x000f, by);
          sums[1] += multiply_pairs(w & 0x00f0, by);
          sums[2] += multiply_pairs(w & 0x0f00, by);
          sums[3] += multiply_pairs((vs)((vw)w >> 12), by);
          TRIMTAB_UNROLL for (int n = 0; n < 4; n++) settle(sums[n]);
        }
        constexpr float kShare[] = {1, 0x1p-4f, 0x1p-8f, 1};
        float* to = y + q.value * kVector + half * 4 * V;
        TRIMTAB_UNROLL for (int n = 0; n < 4; n++, to += V)
          store(to, load<vf>(to) + __builtin_convertvector(sums[n], vf) * (each * kShare[n]));
      }
    };
    vector(Number<0>()), vector(Number<1>()), vector(Number<2>()), vector(Number<3>());
  }
};

}  // namespace
}  // namespace trimtab
