// Weights of int8: products of 16-bit integers in pairs, which are exact.
//
// A vector of bytes is two of 16-bit integers by shifts alone: those of odd places are the upper halves of 16 bits, those of
// even places the lower ones. So x has, of every 4 V places, the even ones first; what fills no vector stays in order.
#pragma once

#include "kernel_rows.h"

namespace trimtab {
namespace {

inline vs even_bytes(vs w) { return (vs)((vw)w << 8) >> 8; }
inline vs odd_bytes(vs w) { return w >> 8; }

struct Int8Kernel {
  static constexpr int64_t kStep = 4 * V;
  static constexpr int kDotRows = 2, kDotRowsApart = 4, kSumRows = 8;

  static void split(const int16_t* from, int64_t width, int16_t* to) {
    int64_t i = 0;
    for (; i + kStep <= width; i += kStep)
      for (int64_t j = 0; j < 2 * V; j++) to[i + j] = from[i + 2 * j], to[i + 2 * V + j] = from[i + 2 * j + 1];
    std::copy(from + i, from + width, to + i);
  }

  // out[t][r] = x[t] . row[r], for T tokens.
  template <int T, int R, bool kApart>
  static void dot(const Rows<R>& now, const Rows<R>& next, int64_t width, const Activations& x, float out[T][R]) {
    Ahead<R, R * kStep, kApart> ahead(next, 0, width, 1);
    const int64_t groups = x.step * groups_of(width), stride = groups * kGroup;  // from token to token
    vf sums[T][R] = {};
    float rest[T][R] = {};
    for (int64_t group = 0; group * kGroup < width; group++) {
      const int64_t end = std::min(width, (group + 1) * kGroup);
      vi even[T][R] = {}, odd[T][R] = {};
      int64_t i = group * kGroup;
      for (; i + kStep <= end; i += kStep) {
        ahead.ask();
        TRIMTAB_UNROLL for (int r = 0; r < R; r++) {
          const vs w = load<vs>(now.row[r].data + i);
          TRIMTAB_UNROLL for (int t = 0; t < T; t++) {
            even[t][r] += multiply_pairs(even_bytes(w), load<vs>(x.integers + t * stride + i));
            odd[t][r] += multiply_pairs(odd_bytes(w), load<vs>(x.integers + t * stride + i + 2 * V));
          }
        }
      }
      TRIMTAB_UNROLL for (int t = 0; t < T; t++) {
        const float scale = x.scale[t * groups + group];
        TRIMTAB_UNROLL for (int r = 0; r < R; r++) {
          sums[t][r] += __builtin_convertvector(even[t][r] + odd[t][r], vf) * scale;
          int32_t tail = 0;
          for (int64_t j = i; j < end; j++) tail += load<int8_t>(now.row[r].data + j) * x.integers[t * stride + j];
          rest[t][r] += static_cast<float>(tail) * scale;
        }
      }
    }
    TRIMTAB_UNROLL for (int t = 0; t < T; t++)
      TRIMTAB_UNROLL for (int r = 0; r < R; r++) out[t][r] = (total(sums[t][r]) + rest[t][r]) * *now.row[r].scale;
  }

  // y[j] += sum over r of h[r] * row[r][first + j], for j in [0, size), with h rounded to 16 bits of its largest. y has the
  // places of every 4 V in another order, which `order` undoes.
  template <bool kApart>
  static void sum(const Rows<kSumRows>& now, const Rows<kSumRows>& next, const float* h, int64_t first, int64_t size,
                  float* y) {
    float factor[kSumRows], most = 0, spoilt = 0;  // times 0: NaN where one is not finite
    for (int r = 0; r < kSumRows; r++) {
      factor[r] = h[r] * *now.row[r].scale;
      most = std::max(most, std::fabs(factor[r]));
      spoilt += factor[r] * 0;
    }
    const float step = most / 32767 + spoilt, inverse = most > 0 ? 32767 / most : 0;
    int32_t rounded[kSumRows];
    for (int r = 0; r < kSumRows; r++) rounded[r] = static_cast<int32_t>(std::lrintf(factor[r] * inverse));
    vs pair[kSumRows / 2];
    TRIMTAB_UNROLL for (int p = 0; p < kSumRows / 2; p++)
      pair[p] = (vs)(vi{} + ((rounded[2 * p] & 0xffff) | static_cast<int32_t>(static_cast<uint32_t>(rounded[2 * p + 1]) << 16)));
    Ahead<kSumRows, kSumRows * kStep, kApart> ahead(next, first, size, 1);
    int64_t j = 0;
    for (; j + kStep <= size; j += kStep) {
      ahead.ask();
      vi sums[4] = {};
      TRIMTAB_UNROLL for (int p = 0; p < kSumRows / 2; p++) {
        const vs a = load<vs>(now.row[2 * p].data + first + j), b = load<vs>(now.row[2 * p + 1].data + first + j);
        const vs low = interleave_low(a, b), high = interleave_high(a, b);
        sums[0] += multiply_pairs(even_bytes(low), pair[p]);
        sums[1] += multiply_pairs(odd_bytes(low), pair[p]);
        sums[2] += multiply_pairs(even_bytes(high), pair[p]);
        sums[3] += multiply_pairs(odd_bytes(high), pair[p]);
        TRIMTAB_UNROLL for (int n = 0; n < 4; n++) settle(sums[n]);
      }
      TRIMTAB_UNROLL for (int n = 0; n < 4; n++) {
        float* to = y + j + n * V;
        store(to, load<vf>(to) + __builtin_convertvector(sums[n], vf) * step);
      }
    }
    for (; j < size; j++)
      for (int r = 0; r < kSumRows; r++) y[j] += factor[r] * load<int8_t>(now.row[r].data + first + j);
  }

  // Of each vector of 4 V places: lanes of 16, of which four vectors hold every second place of either half.
  static void order(float* y, int64_t size) {
    float mixed[kStep];
    for (int64_t j = 0; j + kStep <= size; j += kStep) {
      std::copy_n(y + j, kStep, mixed);
      for (int lane = 0; lane < V / 4; lane++)
        for (int n = 0; n < 4; n++)
          for (int i = 0; i < 4; i++) y[j + lane * 16 + n / 2 * 8 + 2 * i + n % 2] = mixed[n * V + lane * 4 + i];
    }
  }
};

}  // namespace
}  // namespace trimtab
