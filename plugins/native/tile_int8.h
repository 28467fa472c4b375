// Products of some rows of activations with int8 weights of a block, of which activations are bytes, too.
//
// Where the processor multiplies bytes at all, one factor is unsigned: weights are, with 128 added, and what that adds to a
// sum is known from the activations alone. Without VNNI sums of two products have to fit into 16 bits, so activations have
// fewer levels.
//
// Weights lie in the order in which they are multiplied, see `pack_up` and `pack_down`: memory is read from front to back, and
// no sum has to be added up across a vector.
#pragma once

#include <cmath>

#include "chunk.h"
#include "stream.h"

namespace trimtab {
namespace {

#if defined(TRIMTAB_VNNI)
constexpr int kLevels = 127;  // of activations, to either side of 0
constexpr int kBase = 256;    // of two bytes for one activation
#else
constexpr int kLevels = 64;
constexpr int kBase = 128;
#endif
constexpr int kLargest = (kBase / 2 - 1) * (kBase + 1);  // that two bytes hold

// Rows of bytes of a tile, with two vectors of weights: as many sums as there are registers for.
#if TRIMTAB_WIDTH == 16 || defined(TRIMTAB_VNNI)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif

constexpr int64_t kVectorBytes = 4 * V;

typedef int64_t vl __attribute__((vector_size(4 * V)));

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

// The sum of all elements.
inline int32_t sum_of(vi v) {
  constexpr auto kLanes = std::make_integer_sequence<int, V>();
  if constexpr (V > 8) v += (vi)neighbours<8>((vf)v, kLanes);
  v += (vi)neighbours<4>((vf)v, kLanes);
  v += (vi)neighbours<2>((vf)v, kLanes);
  v += (vi)neighbours<1>((vf)v, kLanes);
  return v[0];
}

// `count` values of x, each times that of `by` where there is one, in `limbs` bytes each, one or two, the high ones first and
// the others `stride` behind; zeros up to `padded` places. Returns the scale of the last bytes, of which others have kBase
// times as much; it is NaN where a value is not finite. sums: of the bytes, 128 times, which is what 128 more in each weight
// adds; those of the others `sums_stride` behind.
inline float round_bytes(const float* x, const float* by, int64_t count, int64_t padded, int64_t limbs, int8_t* out,
                         int64_t stride, int32_t* sums, int64_t sums_stride) {
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
  const bool none = nothing != nothing || most < 0x1p-100f;  // or so small that the inverse would be none
  for (int64_t l = 0; l < limbs; l++) {
    sums[l * sums_stride] = 0;
    if (none || padded != whole) std::memset(out + l * stride, 0, padded);
  }
  if (none) return nothing;
  const float levels = limbs == 1 ? kLevels : kLargest, inverse = levels / most;
  vi high_sums = {}, low_sums = {};
  const auto put = [&](vf v, int64_t i, int64_t places) {
    const auto write = [&](vi q, int8_t* to) {
      const vb bytes = __builtin_convertvector(q, vb);
      std::memcpy(to + i, &bytes, places);
    };
    const vi q = round_to_integers(v * inverse);
    if (limbs == 1) {
      high_sums += q;
      return write(q, out);
    }
    const vi low = ((q + kBase / 2) & (kBase - 1)) - kBase / 2, high = (q - low) / kBase;
    high_sums += high, low_sums += low;
    write(high, out), write(low, out + stride);
  };
  for (int64_t i = 0; i < whole; i += V) put(at(i), i, V);
  if (whole < count) put(rest(), whole, count - whole);
  sums[0] = 128 * sum_of(high_sums);
  if (limbs == 2) sums[sums_stride] = 128 * sum_of(low_sums);
  return most / levels;
}

// sums[t][n V + r] = sum of x[t] times row r of vector n, over `steps` steps, each of which is N vectors of V rows and four
// columns, or (kHalf) one of V / 2 rows and eight columns.
template <int T, int N, bool kHalf>
void dot_bytes(const char* panel, int64_t steps, const int8_t* const* x, int32_t* sums, Stream& next, int64_t lines) {
  vi sum[T][N] = {};
  for (int64_t i = 0; i < steps; i++, panel += N * kVectorBytes) {
    next.ask(lines);
    vi w[N];
    TRIMTAB_UNROLL for (int n = 0; n < N; n++) w[n] = load<vi>(panel + n * kVectorBytes);
    TRIMTAB_UNROLL for (int t = 0; t < T; t++) {
      const vi by = kHalf ? (vi)(vl{} + load<int64_t>(x[t] + 8 * i)) : vi{} + load<int32_t>(x[t] + 4 * i);
      TRIMTAB_UNROLL for (int n = 0; n < N; n++) multiply_bytes(w[n], by, sum[t][n]);
    }
  }
  TRIMTAB_UNROLL for (int t = 0; t < T; t++)
    TRIMTAB_UNROLL for (int n = 0; n < N; n++) {
      if (!kHalf) std::memcpy(sums + (t * N + n) * V, &sum[t][n], sizeof sum[t][n]);
      else
        for (int r = 0; r < V / 2; r++) sums[t * V / 2 + r] = sum[t][n][2 * r] + sum[t][n][2 * r + 1];
    }
}

// y[t] += sum over rows of h times what a panel, of N V columns, has of them; h: T rows of bytes, `stride` apart, kLimbs of which
// are a token's.
template <int T, int N, int kLimbs>
void sum_bytes(const char* panel, int64_t quads, const BlockBytes* h, int64_t stride, float* const* y, Stream& next,
               int64_t lines) {
  vi sum[T][N];
  TRIMTAB_UNROLL for (int t = 0; t < T; t++)
    TRIMTAB_UNROLL for (int n = 0; n < N; n++) sum[t][n] = vi{} - h[t * stride].sum;
  for (int64_t q = 0; q < quads; q++, panel += N * kVectorBytes) {
    next.ask(lines);
    vi w[N];
    TRIMTAB_UNROLL for (int n = 0; n < N; n++) w[n] = load<vi>(panel + n * kVectorBytes);
    TRIMTAB_UNROLL for (int t = 0; t < T; t++) {
      const vi by = vi{} + load<int32_t>(h[t * stride].values + 4 * q);
      TRIMTAB_UNROLL for (int n = 0; n < N; n++) multiply_bytes(w[n], by, sum[t][n]);
    }
  }
  static_assert(T % kLimbs == 0 && kChunk * 128 * 128 < (1 << 30) / kBase);  // sums of two bytes are one integer
  TRIMTAB_UNROLL for (int t = 0; t < T; t += kLimbs)
    TRIMTAB_UNROLL for (int n = 0; n < N; n++) {
      float* to = y[t / kLimbs] + n * V;
      const vi whole = kLimbs == 1 ? sum[t][n] : sum[t][n] * kBase + sum[t + kLimbs - 1][n];
      store(to, load<vf>(to) + __builtin_convertvector(whole, vf) * h[(t + kLimbs - 1) * stride].scale);
    }
}

}  // namespace
}  // namespace trimtab
