// What rounds activations to integers: the least and largest of vectors, and their nearest integers.
#pragma once

#include <algorithm>
#include <cmath>

#include "vectors.h"

namespace trimtab {
namespace {

inline vf lesser(vf a, vf b) { return a < b ? a : b; }

// Half to even, of the product as it is in float32: one fused with the rounding would differ where it is nearly half.
inline vi nearest(vf v) {
#if TRIMTAB_WIDTH == 16 && defined(__AVX512F__)
  return (vi)_mm512_cvtps_epi32((__m512)v);
#elif TRIMTAB_WIDTH == 8 && defined(__AVX2__)
  return (vi)_mm256_cvtps_epi32((__m256)v);
#elif TRIMTAB_WIDTH == 4 && defined(__SSE2__)
  return (vi)_mm_cvtps_epi32((__m128)v);
#else
  vi q;
  for (int i = 0; i < V; i++) q[i] = static_cast<int32_t>(std::nearbyint(v[i]));
  return q;
#endif
}

// `count` < V values, zeros behind them.
inline vf load_part(const float* x, int64_t count) {
  float all[V] = {};
  std::copy_n(x, count, all);
  return load<vf>(all);
}

template <typename Pick>
inline float across(vf v, const Pick& pick) {
  float parts[V];
  std::memcpy(parts, &v, sizeof v);
  for (int half = V / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) parts[i] = pick(parts[i], parts[i + half]);
  return parts[0];
}

}  // namespace
}  // namespace trimtab
