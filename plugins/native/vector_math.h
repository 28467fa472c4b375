// What attention needs of vectors beyond arithmetic: parts of them, transposes, reductions over their elements, and e^x.
#pragma once

#include <cmath>
#include <utility>

#include "kernel_rows.h"
#include "vectors.h"

namespace trimtab {
namespace {

// The first `count` < V floats, and zeros.
inline vf load_some(const float* from, int64_t count) {
  float parts[V] = {};
  std::memcpy(parts, from, 4 * count);
  return load<vf>(parts);
}

inline vf all(float value) { return vf{} + value; }

template <int kStep, bool kSecond, int... J>
inline vf exchange(vf a, vf b, std::integer_sequence<int, J...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, (kSecond ? (J & kStep ? V + J : J + kStep) : (J & kStep ? V + J - kStep : J))...);
#else
  return __builtin_shuffle(a, b, vi{(kSecond ? (J & kStep ? V + J : J + kStep) : (J & kStep ? V + J - kStep : J))...});
#endif
}

// Swaps the squares of kStep that lie off the diagonal of each square of 2 kStep.
template <int kStep>
inline void transpose_step(vf rows[V]) {
  constexpr auto kLanes = std::make_integer_sequence<int, V>();
  TRIMTAB_UNROLL_ALL for (int i = 0; i < V; i++) {
    if (i & kStep) continue;
    const vf a = rows[i], b = rows[i + kStep];
    rows[i] = exchange<kStep, false>(a, b, kLanes);
    rows[i + kStep] = exchange<kStep, true>(a, b, kLanes);
  }
}

inline void transpose(vf rows[V]) {
  if constexpr (V > 8) transpose_step<8>(rows);
  if constexpr (V > 4) transpose_step<4>(rows);
  transpose_step<2>(rows);
  transpose_step<1>(rows);
}

template <int kStep, int... J>
inline vf neighbours(vf v, std::integer_sequence<int, J...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(v, v, (J ^ kStep)...);
#else
  return __builtin_shuffle(v, vi{(J ^ kStep)...});
#endif
}

// The combination of all V elements, in every element.
template <typename Combine>
inline vf across(vf v, const Combine& combine) {
  constexpr auto kLanes = std::make_integer_sequence<int, V>();
  if constexpr (V > 8) v = combine(v, neighbours<8>(v, kLanes));
  if constexpr (V > 4) v = combine(v, neighbours<4>(v, kLanes));
  v = combine(v, neighbours<2>(v, kLanes));
  return combine(v, neighbours<1>(v, kLanes));
}

// e^x for x <= 0, to 2^-22 of it; 0 below the smallest normal number; NaN stays NaN. x = n ln 2 + r; e^r by a polynomial.
inline vf exp_of_negative(vf x) {
  constexpr float kLeast = -87.33654f, kShift = 0x1.8p23f;
  const vf bounded = x < kLeast ? all(kLeast) : x;
  const vf shifted = bounded * 0x1.715476p+0f + kShift;  // n in its last bits
  const vf n = shifted - kShift;
  const vf r = (bounded - n * 0x1.63p-1f) + n * 0x1.bd0106p-13f;  // ln 2 = 0x1.63p-1 - 0x1.bd0106p-13; the first product is exact
  vf y = r * 0x1.0F9F9Cp-7f + 0x1.573A1Ap-5f;
  y = y * r + 0x1.555A80p-3f;
  y = y * r + 0x1.FFFDC6p-2f;
  y = y * r + 0x1.FFFFF6p-1f;
  y = y * r + 1.0f;
  const vf power = (vf)(((vi)shifted << 23) + 0x3f800000);
  return x < kLeast ? vf{} : y * power;
}

}  // namespace
}  // namespace trimtab
