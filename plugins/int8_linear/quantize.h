// A row of x → integers in [0, 255], 255 steps from its least to its greatest value, one of which is 0.
//
// Where bytes are multiplied directly (VNNI) they lie as they are. Elsewhere they are 16-bit integers whose products in pairs
// are exact; of four, the even ones first, since shifts alone make even and odd weights of bytes.
#pragma once

#include <limits>

#include "../native/rounding.h"
#include "kernels.h"

namespace trimtab {
namespace {

#define TRIMTAB_ALL _Pragma("GCC unroll 16")

#if defined(TRIMTAB_VNNI)
typedef uint8_t Integer;
#else
typedef int16_t Integer;
#endif

// Rows start at odd multiples of a cache line: multiples of 4 KiB would all want the same lines of the first cache.
inline int64_t row_bytes(int64_t in_features) {
  const int64_t lines = ((in_features + 3) / 4 * 4 * static_cast<int64_t>(sizeof(Integer)) + 63) / 64;
  return (lines | 1) * 64;
}

// V integers from `v` [0, 255] on, as they lie in a row; `to` is a multiple of four.
inline void write(vi v, Integer* to) {
#if defined(TRIMTAB_VNNI) && TRIMTAB_WIDTH == 16
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(TRIMTAB_VNNI) && TRIMTAB_WIDTH == 8
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
#elif TRIMTAB_WIDTH == 16 && defined(__AVX512F__)
  const __m256i words = _mm512_cvtepi32_epi16((__m512i)v);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xd8), 0xd8));
#elif TRIMTAB_WIDTH == 8 && defined(__AVX2__)
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shufflehi_epi16(_mm_shufflelo_epi16(words, 0xd8), 0xd8));
#else
  for (int i = 0; i < V; i += 4)
    to[i] = static_cast<Integer>(v[i]), to[i + 1] = static_cast<Integer>(v[i + 2]),
    to[i + 2] = static_cast<Integer>(v[i + 1]), to[i + 3] = static_cast<Integer>(v[i + 3]);
#endif
}

inline vi rounded(vf x, float inverse, int32_t zero) {
  const vi q = nearest(x * inverse) + zero;
  const vi most = vi{} + 255;
  return q > most ? most : q;
}

RowScale quantize(const float* x, int64_t in_features, char* integers) {
  constexpr int kChains = 4;  // each operation waits for its own last result alone
  vf least[kChains] = {}, greatest[kChains] = {}, spoilt[kChains] = {};  // x * 0 is NaN where x is not finite
  int64_t i = 0;
  const auto look = [&](int chain, vf v) {
    least[chain] = lesser(v, least[chain]), greatest[chain] = larger(v, greatest[chain]), spoilt[chain] += v * 0.0f;
  };
  for (; i + kChains * V <= in_features; i += kChains * V)
    TRIMTAB_ALL for (int c = 0; c < kChains; c++) look(c, load<vf>(x + i + c * V));
  for (; i + V <= in_features; i += V) look(0, load<vf>(x + i));
  if (i < in_features) look(0, load_part(x + i, in_features - i));
  const float low = across(lesser(lesser(least[0], least[1]), lesser(least[2], least[3])),
                           [](float a, float b) { return a < b ? a : b; });
  const float high = across(larger(larger(greatest[0], greatest[1]), larger(greatest[2], greatest[3])),
                            [](float a, float b) { return a > b ? a : b; });
  const float range = std::max(high - low, 0x1p-100f);  // of zeros alone, or so small that its inverse is none
  if (std::isnan(total(spoilt[0] + spoilt[1] + (spoilt[2] + spoilt[3]))) || !(range <= std::numeric_limits<float>::max()))
    return {std::numeric_limits<float>::quiet_NaN(), 0};
  const float inverse = 255.0f / range;
  const int32_t zero = static_cast<int32_t>(std::nearbyint(-low * inverse));
  auto* to = reinterpret_cast<Integer*>(integers);
  for (i = 0; i + V <= in_features; i += V) write(rounded(load<vf>(x + i), inverse, zero), to + i);
  if (i < in_features) {  // weights behind the last input are 0
    Integer rest[V];
    write(rounded(load_part(x + i, in_features - i), inverse, zero), rest);
    std::copy_n(rest, (in_features - i + 3) / 4 * 4, to + i);
  }
  return {range / 255.0f, zero};
}

}  // namespace
}  // namespace trimtab
