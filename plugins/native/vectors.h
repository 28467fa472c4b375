// Vectors of TRIMTAB_WIDTH floats and what the kernels do with them. The compiler's vector extensions give arithmetic; the
// few things that it makes poor code of are intrinsics, with plain code beside them for other processors.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace trimtab {
namespace {

constexpr int V = TRIMTAB_WIDTH;

typedef float vf __attribute__((vector_size(4 * V)));
typedef int32_t vi __attribute__((vector_size(4 * V)));
typedef uint32_t vu __attribute__((vector_size(4 * V)));
typedef int16_t vs __attribute__((vector_size(4 * V)));  // 2 V of them
typedef uint16_t vw __attribute__((vector_size(4 * V)));
typedef int8_t vb __attribute__((vector_size(V)));
typedef uint16_t vh __attribute__((vector_size(2 * V)));

template <typename T>
inline T load(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

inline float total(vf v) {
  float parts[V];
  std::memcpy(parts, &v, sizeof v);
  for (int half = V / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) parts[i] += parts[i + half];
  return parts[0];
}

inline vf magnitude(vf v) { return (vf)((vi)v & 0x7fffffff); }
inline vf larger(vf a, vf b) { return a > b ? a : b; }

// A sum that has to be complete here: GCC otherwise adds up later, and keeps the parts in memory for lack of registers.
inline void settle([[maybe_unused]] vi& v) {
#if defined(__SSE2__) && (TRIMTAB_WIDTH == 4 || (TRIMTAB_WIDTH == 8 && defined(__AVX2__)) || defined(__AVX512F__))
  __asm__("" : "+x"(v));
#endif
}

// The nearest integers of numbers below 2^22: what is added leaves no bits for a fraction.
inline vi round_to_integers(vf v) { return (vi)((vu)(v + 0x1.8p23f) - 0x4b400000u); }

template <int N>
struct Number {
  static constexpr int value = N;
};

// Elements q V / 4 to (q + 1) V / 4, each in all four places of its 128 bits.
template <int q>
vf spread(vf v) {
#if TRIMTAB_WIDTH == 16 && defined(__AVX512F__)
  constexpr int a = 4 * q, b = a + 1, c = a + 2, d = a + 3;
  return (vf)_mm512_permutexvar_ps(_mm512_setr_epi32(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d), (__m512)v);
#elif TRIMTAB_WIDTH == 8 && defined(__AVX2__)
  constexpr int a = 2 * q, b = a + 1;
  return (vf)_mm256_permutevar8x32_ps((__m256)v, _mm256_setr_epi32(a, a, a, a, b, b, b, b));
#elif TRIMTAB_WIDTH == 4 && defined(__SSE2__)
  return (vf)_mm_shuffle_ps((__m128)v, (__m128)v, q * 0x55);
#else
  vf found;
  for (int i = 0; i < V; i++) found[i] = v[q * (V / 4) + i / 4];
  return found;
#endif
}

// 16-bit integers of a and b in turns: of the lower and the upper half of every 128 bits.
inline vs interleave_low(vs a, vs b) {
#if TRIMTAB_WIDTH == 16 && defined(__AVX512BW__)
  return (vs)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
#elif TRIMTAB_WIDTH == 8 && defined(__AVX2__)
  return (vs)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b);
#elif TRIMTAB_WIDTH == 4 && defined(__SSE2__)
  return (vs)_mm_unpacklo_epi16((__m128i)a, (__m128i)b);
#else
  vs found;
  for (int i = 0; i < V; i++) found[2 * i] = a[i / 4 * 8 + i % 4], found[2 * i + 1] = b[i / 4 * 8 + i % 4];
  return found;
#endif
}

inline vs interleave_high(vs a, vs b) {
#if TRIMTAB_WIDTH == 16 && defined(__AVX512BW__)
  return (vs)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
#elif TRIMTAB_WIDTH == 8 && defined(__AVX2__)
  return (vs)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b);
#elif TRIMTAB_WIDTH == 4 && defined(__SSE2__)
  return (vs)_mm_unpackhi_epi16((__m128i)a, (__m128i)b);
#else
  vs found;
  for (int i = 0; i < V; i++) found[2 * i] = a[i / 4 * 8 + 4 + i % 4], found[2 * i + 1] = b[i / 4 * 8 + 4 + i % 4];
  return found;
#endif
}

// a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1], V sums.
inline vi multiply_pairs(vs a, vs b) {
#if TRIMTAB_WIDTH == 16 && defined(__AVX512BW__)
  return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif TRIMTAB_WIDTH == 8 && defined(__AVX2__)
  return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif TRIMTAB_WIDTH == 4 && defined(__SSE2__)
  return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  vi v;
  for (int i = 0; i < V; i++) v[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return v;
#endif
}

inline vf widen_bfloat(const char* p) { return (vf)(__builtin_convertvector(load<vh>(p), vu) << 16); }

inline float widen_bfloat(uint16_t bits) {
  const uint32_t shifted = static_cast<uint32_t>(bits) << 16;
  return load<float>(&shifted);
}

// Shift exponent and mantissa into place, and multiply by 2^112 for the difference of the exponents' biases.
inline float widen_half(uint16_t bits) {
  const uint32_t shifted = (bits & 0x7fffu) << 13;
  const float magnitude = load<float>(&shifted) * 0x1p112f;
  return bits & 0x8000 ? -magnitude : magnitude;
}

inline vf widen_half(const char* p) {
#if TRIMTAB_WIDTH == 16 && defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(load<__m256i>(p));
#elif TRIMTAB_WIDTH == 8 && defined(__F16C__)
  return (vf)_mm256_cvtph_ps(load<__m128i>(p));
#else
  const vu bits = __builtin_convertvector(load<vh>(p), vu);
  const vf magnitude = (vf)((bits & 0x7fff) << 13) * 0x1p112f;
  return (vf)((vu)magnitude | ((bits & 0x8000) << 16));
#endif
}

}  // namespace
}  // namespace trimtab
