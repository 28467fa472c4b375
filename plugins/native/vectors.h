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

// V bytes as integers.
inline vi widen_bytes(const char* p, bool is_signed) {
#if defined(__AVX512F__)
  const __m128i bytes = load<__m128i>(p);
  return (vi)(is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (vi)(is_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#elif defined(__SSE2__)
  const __m128i four = _mm_cvtsi32_si128(load<int32_t>(p)), zero = _mm_setzero_si128();
  if (!is_signed) return (vi)_mm_unpacklo_epi16(_mm_unpacklo_epi8(four, zero), zero);
  const __m128i twice = _mm_unpacklo_epi8(four, four);
  return (vi)_mm_srai_epi32(_mm_unpacklo_epi16(twice, twice), 24);
#else
  vi v;
  for (int i = 0; i < V; i++) v[i] = is_signed ? load<int8_t>(p + i) : load<uint8_t>(p + i);
  return v;
#endif
}

// 2 V signed bytes as 16-bit integers.
inline vs widen_bytes_to_shorts(const char* p) {
#if defined(__AVX512BW__)
  return (vs)_mm512_cvtepi8_epi16(load<__m256i>(p));
#elif defined(__AVX2__)
  return (vs)_mm256_cvtepi8_epi16(load<__m128i>(p));
#elif defined(__SSE2__)
  const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (vs)_mm_srai_epi16(_mm_unpacklo_epi8(eight, eight), 8);
#else
  vs v;
  for (int i = 0; i < 2 * V; i++) v[i] = load<int8_t>(p + i);
  return v;
#endif
}

// a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1], V sums.
inline vi multiply_pairs(vs a, vs b) {
#if defined(__AVX512BW__)
  return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  vi v;
  for (int i = 0; i < V; i++) v[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return v;
#endif
}

// A block of 32 int4 weights, less their zero point: those of even place first, then those of odd place.
class Nibbles {
 public:
  explicit Nibbles(const char* bytes) {
#if defined(__SSE2__)
    const __m128i both = load<__m128i>(bytes), low = _mm_set1_epi8(15), zero = _mm_set1_epi8(8);
    const __m128i even = _mm_sub_epi8(_mm_and_si128(both, low), zero);
    const __m128i odd = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(both, 4), low), zero);
    char parts[32];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(parts), even);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(parts + 16), odd);
#else
    char parts[32];
    for (int i = 0; i < 16; i++) {
      parts[i] = static_cast<char>((load<uint8_t>(bytes + i) & 15) - 8);
      parts[16 + i] = static_cast<char>((load<uint8_t>(bytes + i) >> 4) - 8);
    }
#endif
    for (int i = 0; i < kParts; i++) part_[i] = widen_bytes_to_shorts(parts + i * 2 * V);
  }

  // V partial sums of the products with 32 integers in the same order.
  vi dot(const int16_t* x) const {
    vi sum = multiply_pairs(part_[0], load<vs>(x));
    for (int i = 1; i < kParts; i++) sum += multiply_pairs(part_[i], load<vs>(x + i * 2 * V));
    return sum;
  }

 private:
  static constexpr int kParts = 32 / (2 * V);
  vs part_[kParts];
};

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
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(load<__m256i>(p));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(load<__m128i>(p));
#else
  const vu bits = __builtin_convertvector(load<vh>(p), vu);
  const vf magnitude = (vf)((bits & 0x7fff) << 13) * 0x1p112f;
  return (vf)((vu)magnitude | ((bits & 0x8000) << 16));
#endif
}

}  // namespace
}  // namespace trimtab
