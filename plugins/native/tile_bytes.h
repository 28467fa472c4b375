// Products of some tokens with some rows of int8, of which activations are bytes, too.
//
// Where the processor multiplies bytes at all, one factor is unsigned: weights are, with 128 added, and what that adds to a
// sum is known from the activations alone. Without VNNI sums of two products have to fit into 16 bits, so activations have
// fewer levels.
#pragma once

#include <cmath>

#include "chunk.h"

namespace trimtab {
namespace {

#if defined(TRIMTAB_VNNI)
constexpr int kLevels = 127;  // of activations, to either side of 0
#else
constexpr int kLevels = 64;
#endif

constexpr int64_t kBytesWide = 4 * V;  // columns of a tile of `sum`
constexpr int64_t kPanels = 2;         // such tiles that are put in order at a time
constexpr int64_t kStepLines = 4 * kBytesWide / 64;  // of memory, that four rows have in so many columns

// sum[i] += w[4 i] x[4 i] + ... + w[4 i + 3] x[4 i + 3], of unsigned w and signed x.
inline void multiply_bytes(vi w, vi x, vi& sum) {
#if defined(TRIMTAB_VNNI) && TRIMTAB_WIDTH == 16
  sum = (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif defined(TRIMTAB_VNNI)
  sum = (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
#elif TRIMTAB_WIDTH == 16
  sum += (vi)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)w, (__m512i)x), _mm512_set1_epi16(1));
#else
  sum += (vi)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)w, (__m256i)x), _mm256_set1_epi16(1));
#endif
}

inline vi unsigned_bytes(vi w) { return w ^ static_cast<int32_t>(0x80808080); }

// The sum of all elements.
inline int32_t sum_of(vi v) {
  constexpr auto kLanes = std::make_integer_sequence<int, V>();
  if constexpr (V > 8) v += (vi)neighbours<8>((vf)v, kLanes);
  v += (vi)neighbours<4>((vf)v, kLanes);
  v += (vi)neighbours<2>((vf)v, kLanes);
  v += (vi)neighbours<1>((vf)v, kLanes);
  return v[0];
}

// `count` values of x, each times that of `by` where there is one, as bytes, and zeros up to `padded` places. Returns their
// scale, which is NaN where one is not finite; sum: of the bytes, 128 times, which is what 128 more in each weight adds.
inline float round_bytes(const float* x, const float* by, int64_t count, int64_t padded, int8_t* out, int32_t* sum) {
  vf largest = {}, spoilt = {};  // x * 0 is NaN where x is not finite
  const int64_t whole = count / V * V;
  const auto at = [&](int64_t i) { return by == nullptr ? load<vf>(x + i) : load<vf>(x + i) * load<vf>(by + i); };
  const auto rest = [&] {
    return by == nullptr ? load_some(x + whole, count - whole) : load_some(x + whole, count - whole) * load_some(by + whole, count - whole);
  };
  const auto look = [&](vf v) { largest = larger(largest, magnitude(v)), spoilt += v * 0.0f; };
  for (int64_t i = 0; i < whole; i += V) look(at(i));
  if (whole < count) look(rest());
  const float most = across(largest, [](vf a, vf b) { return larger(a, b); })[0];
  const float nothing = across(spoilt, [](vf a, vf b) { return a + b; })[0];
  *sum = 0;
  const bool none = nothing != nothing || most < 0x1p-100f;  // or so small that the inverse would be none
  if (none || padded != whole) std::memset(out, 0, padded);
  if (none) return nothing;
  const float inverse = kLevels / most;
  vi sums = {};
  const auto put = [&](vf v, int64_t i, int64_t places) {
    const vi q = round_to_integers(v * inverse);
    const vb bytes = __builtin_convertvector(q, vb);
    sums += q;
    std::memcpy(out + i, &bytes, places);
  };
  for (int64_t i = 0; i < whole; i += V) put(at(i), i, V);
  if (whole < count) put(rest(), whole, count - whole);
  *sum = 128 * sum_of(sums);
  return most / kLevels;
}

// out[t][r] = sum over i < size of x[t][i] * (rows[r][i] + 128). x has zeros up to a multiple of kBytesWide. Of what comes
// next, `lines` are asked for with every kBytesWide columns.
template <int T>
void dot_bytes(const char* const* rows, const int8_t* const* x, int64_t size, int32_t (*out)[kDotRows], Lines& next,
               int64_t lines) {
  vi sums[T][kDotRows] = {};
  int64_t i = 0;
  const auto add = [&](const char* const* from, int64_t at) {
    vi a[T];
    TRIMTAB_UNROLL for (int t = 0; t < T; t++) a[t] = load<vi>(x[t] + i);
    TRIMTAB_UNROLL for (int r = 0; r < kDotRows; r++) {
      const vi w = unsigned_bytes(load<vi>(from[r] + at));
      TRIMTAB_UNROLL for (int t = 0; t < T; t++) multiply_bytes(w, a[t], sums[t][r]);
    }
  };
  for (; i + kBytesWide <= size; i += kBytesWide) {
    next.ask(lines);
    add(rows, i);
  }
  if (i < size) {
    char rest[kDotRows][kBytesWide] = {};
    const char* from[kDotRows];
    for (int r = 0; r < kDotRows; r++) from[r] = rest[r], std::memcpy(rest[r], rows[r] + i, size - i);
    add(from, 0);
  }
  TRIMTAB_UNROLL for (int t = 0; t < T; t++) {
    const vi sum = totals(sums[t][0], sums[t][1], sums[t][2], sums[t][3]);
    std::memcpy(out[t], &sum, sizeof out[t]);
  }
}

// Four rows from place `at` on side by side: of each 16 columns, those of vector n are 4 n to 4 n + 3, and each has the four
// rows' bytes.
inline void interleave(const char* const* rows, int64_t at, vi* out) {
#if TRIMTAB_WIDTH == 16
  __m512i row[4];
  TRIMTAB_UNROLL for (int r = 0; r < 4; r++) row[r] = load<__m512i>(rows[r] + at);
  const __m512i low01 = _mm512_unpacklo_epi8(row[0], row[1]), high01 = _mm512_unpackhi_epi8(row[0], row[1]);
  const __m512i low23 = _mm512_unpacklo_epi8(row[2], row[3]), high23 = _mm512_unpackhi_epi8(row[2], row[3]);
#else
  __m256i row[4];
  TRIMTAB_UNROLL for (int r = 0; r < 4; r++) row[r] = load<__m256i>(rows[r] + at);
  const __m256i low01 = _mm256_unpacklo_epi8(row[0], row[1]), high01 = _mm256_unpackhi_epi8(row[0], row[1]);
  const __m256i low23 = _mm256_unpacklo_epi8(row[2], row[3]), high23 = _mm256_unpackhi_epi8(row[2], row[3]);
#endif
  const vs all[4] = {interleave_low((vs)low01, (vs)low23), interleave_high((vs)low01, (vs)low23),
                     interleave_low((vs)high01, (vs)high23), interleave_high((vs)high01, (vs)high23)};
  TRIMTAB_UNROLL for (int n = 0; n < 4; n++) out[n] = unsigned_bytes((vi)all[n]);
}

// The same of the last `size` places, with zeros behind them.
inline void interleave_some(const char* const* rows, int64_t at, int64_t size, vi* out) {
  char lines[4][kBytesWide] = {};
  const char* filled[4];
  for (int r = 0; r < 4; r++) filled[r] = lines[r], std::memcpy(lines[r], rows[r] + at, size);
  interleave(filled, 0, out);
}

// Undoes that order in kBytesWide floats.
inline void in_order(const float* from, int64_t size, float* to) {
  float plain[kBytesWide];
  for (int n = 0; n < 4; n++)
    for (int lane = 0; lane < V / 4; lane++) std::copy_n(from + n * V + lane * 4, 4, plain + lane * 16 + n * 4);
  std::copy_n(plain, size, to);
}

// y[t][j] += sum over i of h[t * stride].values[i] * (what the panel has of row i and column j), in the panel's order.
template <int T>
void sum_bytes(const vi* panel, int64_t quads, const BlockBytes* h, int64_t stride, float* const* y) {
  vi sums[T][4];
  TRIMTAB_UNROLL for (int t = 0; t < T; t++)
    TRIMTAB_UNROLL for (int n = 0; n < 4; n++) sums[t][n] = vi{} - h[t * stride].sum;
  for (int64_t q = 0; q < quads; q++, panel += 4) {
    TRIMTAB_UNROLL for (int t = 0; t < T; t++) {
      const vi by = vi{} + load<int32_t>(h[t * stride].values + 4 * q);
      TRIMTAB_UNROLL for (int n = 0; n < 4; n++) multiply_bytes(panel[n], by, sums[t][n]);
    }
  }
  TRIMTAB_UNROLL for (int t = 0; t < T; t++)
    TRIMTAB_UNROLL for (int n = 0; n < 4; n++) {
      float* to = y[t] + n * V;
      store(to, load<vf>(to) + __builtin_convertvector(sums[t][n], vf) * h[t * stride].scale);
    }
}

}  // namespace
}  // namespace trimtab
