// What products with weights of int4 in blocks of 32 have in common: exact sums within a block, and scales.
#pragma once

#include "vectors.h"

namespace trimtab {
namespace {

// `start` and sums of products of bytes, unsigned weights of int4 with signed x, four to a 32-bit integer, at most eight times.
struct Int4Sums {
#if defined(TRIMTAB_VNNI)
  vi sum;
  explicit Int4Sums(int32_t start) : sum(vi{} + start) {}
  void add(vi w, vi x) {
#if TRIMTAB_WIDTH == 16
    sum = (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#else
    sum = (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
#endif
  }
  vi total() const { return sum; }
#elif TRIMTAB_WIDTH == 16 || (TRIMTAB_WIDTH == 8 && defined(__AVX2__))
  // Sums of two products of at most 15 * 128 each, and of the eight such pairs, fit into 16 bits.
  static_assert(16 * 15 * 128 < 1 << 15);
  vs pairs = {};
  int32_t start;
  explicit Int4Sums(int32_t start) : start(start) {}
#if TRIMTAB_WIDTH == 16
  void add(vi w, vi x) { pairs += (vs)_mm512_maddubs_epi16((__m512i)w, (__m512i)x); }
  vi total() const { return (vi)_mm512_madd_epi16((__m512i)pairs, _mm512_set1_epi16(1)) + start; }
#else
  void add(vi w, vi x) { pairs += (vs)_mm256_maddubs_epi16((__m256i)w, (__m256i)x); }
  vi total() const { return (vi)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi16(1)) + start; }
#endif
#else
  vi sum;
  explicit Int4Sums(int32_t start) : sum(vi{} + start) {}
  void add(vi w, vi x) {
    _Pragma("GCC unroll 4") for (int shift = 0; shift < 32; shift += 8) sum += ((w >> shift) & 0xff) * ((x << (24 - shift)) >> 24);
  }
  vi total() const { return sum; }
#endif
};

// V scales, of bfloat16 or floats.
template <bool kShort>
inline vf load_scales(const char* from) {
  if (kShort) return widen_bfloat(from);
  return load<vf>(from);
}

}  // namespace
}  // namespace trimtab
