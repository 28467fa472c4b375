// A row of x → integers in [-127, 127], by the largest of each block; and of each block its scale and what the zero of the
// weights takes off: these are unsigned, so that a sum of products is 8 times that of x too large.
#pragma once

#include <limits>

#include "../native/rounding.h"
#include "kernels.h"

namespace trimtab {
namespace {

constexpr int64_t kBlock = kInt4LinearBlock;
constexpr uint32_t kZero = 8;  // of the weights

struct BlockScale {
  float scale;
  int32_t less;
};

// Integers, and the scales of all blocks behind them. From row to row it is an odd number of cache lines: rows at multiples of
// 4 KiB would all want the same lines of the first cache.
inline int64_t row_bytes(int64_t in_features) {
  const int64_t lines = (in_features + in_features / kBlock * static_cast<int64_t>(sizeof(BlockScale)) + 63) / 64;
  return (lines | 1) * 64;
}

// V integers of at most 127 by magnitude.
inline void write(vi v, char* to) {
#if TRIMTAB_WIDTH == 16 && defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)v));
#elif TRIMTAB_WIDTH == 8 && defined(__AVX2__)
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
#else
  for (int i = 0; i < V; i++) to[i] = static_cast<char>(v[i]);
#endif
}

void quantize(const float* x, int64_t in_features, char* row) {
  const int64_t blocks = in_features / kBlock;
  auto* scales = reinterpret_cast<BlockScale*>(row + in_features);
  vf spoilt = {};  // x * 0 is NaN where x is not finite
  for (int64_t b = 0; b < blocks; b++, x += kBlock, row += kBlock) {
    vf most = {};
    for (int64_t i = 0; i < kBlock; i += V) {
      const vf v = load<vf>(x + i);
      most = larger(magnitude(v), most);
      spoilt += v * 0.0f;
    }
    const float reach = std::max(across(most, [](float a, float b) { return a > b ? a : b; }), 0x1p-100f);
    const float inverse = 127.0f / reach;  // of zeros alone, too, or of numbers so small that they have none
    vu sum = {};  // of what is not finite it may be anything
    for (int64_t i = 0; i < kBlock; i += V) {
      const vi q = nearest(load<vf>(x + i) * inverse);
      write(q, row + i);
      sum += (vu)q;
    }
    uint32_t all = 0;
    for (int i = 0; i < V; i++) all += sum[i];
    scales[b] = {reach / 127.0f, static_cast<int32_t>(0u - kZero * all)};
  }
  if (std::isnan(total(spoilt)))
    for (int64_t b = 0; b < blocks; b++) scales[b] = {std::numeric_limits<float>::quiet_NaN(), 0};
}

}  // namespace
}  // namespace trimtab
