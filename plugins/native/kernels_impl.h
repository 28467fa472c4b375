// The kernels, in vectors of TRIMTAB_WIDTH floats. Included by one source file per instruction set; the compiler's vector
// extensions make each what its flags allow, so there is one text for all of them.
//
// A decoding step is bound by memory: each weight is read once. So rows are taken four at a time, which are as many streams
// for the hardware to prefetch, and the beginnings of the next rows, which it cannot foresee, are asked for ahead.
#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace trimtab {
namespace {

constexpr int V = TRIMTAB_WIDTH;
constexpr int kRows = 4;       // taken together
constexpr int64_t kTile = 1024;  // outputs of `sum` that stay in the first cache

typedef float vf __attribute__((vector_size(4 * V)));
typedef int32_t vi __attribute__((vector_size(4 * V)));
typedef uint32_t vu __attribute__((vector_size(4 * V)));
typedef uint16_t vh __attribute__((vector_size(2 * V)));
typedef int8_t vb __attribute__((vector_size(V)));
typedef uint8_t vq __attribute__((vector_size(V)));

template <typename T>
inline T load(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline vf all(float x) { return vf{} + x; }

inline float total(vf v) {
  float parts[V];
  std::memcpy(parts, &v, sizeof v);
  for (int half = V / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) parts[i] += parts[i + half];
  return parts[0];
}

// V bytes as integers. Compilers make poor code of __builtin_convertvector from bytes.
inline vi widen_bytes(const void* p, bool is_signed) {
#if defined(__AVX512F__)
  const __m128i bytes = load<__m128i>(p);
  return (vi)(is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(p));
  return (vi)(is_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#elif defined(__SSE2__)
  const __m128i four = _mm_cvtsi32_si128(load<int32_t>(p)), zero = _mm_setzero_si128();
  if (!is_signed) return (vi)_mm_unpacklo_epi16(_mm_unpacklo_epi8(four, zero), zero);
  const __m128i twice = _mm_unpacklo_epi8(four, four);
  return (vi)_mm_srai_epi32(_mm_unpacklo_epi16(twice, twice), 24);
#else
  return is_signed ? __builtin_convertvector(load<vb>(p), vi) : __builtin_convertvector(load<vq>(p), vi);
#endif
}

inline vf widen_half(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(load<__m256i>(p));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(load<__m128i>(p));
#else
  // Shift exponent and mantissa into place, and multiply by 2^112 for the difference of the exponents' biases.
  vu bits = __builtin_convertvector(load<vh>(p), vu);
  vf magnitude = (vf)((bits & 0x7fff) << 13) * 0x1p112f;
  return (vf)((vu)magnitude | ((bits & 0x8000) << 16));
#endif
}

inline float widen_half(uint16_t bits) {
  uint32_t shifted = (bits & 0x7fffu) << 13;
  float magnitude;
  std::memcpy(&magnitude, &shifted, 4);
  magnitude *= 0x1p112f;
  return bits & 0x8000 ? -magnitude : magnitude;
}

struct Row {
  const char* data;
  const float* scale;  // int8: one; int4: one per block
};

// One weight format: `vector` widens V weights that begin at element i of a row, `one` a single weight. Integers of int8
// come without their scale, which the sums over a whole row share.
template <Format>
struct As;

template <>
struct As<Format::float32> {
  static vf vector(const Row& row, int64_t i) { return load<vf>(reinterpret_cast<const float*>(row.data) + i); }
  static float one(const Row& row, int64_t i) { return reinterpret_cast<const float*>(row.data)[i]; }
};

template <>
struct As<Format::float16> {
  static vf vector(const Row& row, int64_t i) { return widen_half(reinterpret_cast<const uint16_t*>(row.data) + i); }
  static float one(const Row& row, int64_t i) { return widen_half(reinterpret_cast<const uint16_t*>(row.data)[i]); }
};

template <>
struct As<Format::bfloat16> {
  static vf vector(const Row& row, int64_t i) {
    return (vf)(__builtin_convertvector(load<vh>(reinterpret_cast<const uint16_t*>(row.data) + i), vu) << 16);
  }
  static float one(const Row& row, int64_t i) {
    uint32_t bits = static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(row.data)[i]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
};

template <>
struct As<Format::int8> {
  static vf vector(const Row& row, int64_t i) {
    return __builtin_convertvector(widen_bytes(row.data + i, true), vf);
  }
  static float one(const Row& row, int64_t i) { return reinterpret_cast<const int8_t*>(row.data)[i]; }
};

// Within a block of 32, `i` counts the weights of even place first, then those of odd place: so they lie in low and high
// halves of bytes that follow each other. Callers permute x, or the sums, likewise.
template <>
struct As<Format::int4> {
  static vf vector(const Row& row, int64_t i) {
    const int64_t block = i / kInt4Block, place = i % kInt4Block;
    const vi bytes = widen_bytes(row.data + block * 16 + place % 16, false);
    const vi halves = place < 16 ? bytes & 15 : bytes >> 4;
    return (__builtin_convertvector(halves, vf) - 8.0f) * row.scale[block];
  }
  static float one(const Row&, int64_t) { return 0.0f; }  // widths are multiples of a block
};

inline Row row_at(const Weights& w, int64_t row) {
  const int64_t scales = w.format == Format::int4 ? w.width / kInt4Block : 1;
  return {static_cast<const char*>(w.data) + row * bytes_of(w.format, w.width),
          w.scale == nullptr ? nullptr : w.scale + row * scales};
}

// The next kRows rows from i on; the last one again where there are no more.
inline void find(const Weights& w, const Chosen& chosen, int64_t i, int64_t end, Row* found) {
  for (int r = 0; r < kRows; r++) found[r] = row_at(w, chosen.row(std::min(i + r, end - 1)));
}

// Asks for what lies `at` bytes into each of the next rows, once per cache line.
inline void ask(const Row* next, int64_t at, int64_t step) {
  if (at % 64 < step)
    for (int r = 0; r < kRows; r++) __builtin_prefetch(next[r].data + at, 0, 2);
}

// out[t][r] = x[t] . row[r], for T tokens and kRows rows.
template <Format F, int T>
void dot_tile(const Row* rows, const Row* next, int64_t width, const float* x, float out[T][kRows]) {
  constexpr int64_t kStep = 2 * V;
  vf a[T][kRows] = {}, b[T][kRows] = {};
  int64_t i = 0;
  for (; i + kStep <= width; i += kStep) {
    ask(next, bytes_of(F, i), bytes_of(F, kStep));
    for (int r = 0; r < kRows; r++) {
      const vf w0 = As<F>::vector(rows[r], i), w1 = As<F>::vector(rows[r], i + V);
      for (int t = 0; t < T; t++) {
        a[t][r] += w0 * load<vf>(x + t * width + i);
        b[t][r] += w1 * load<vf>(x + t * width + i + V);
      }
    }
  }
  for (int t = 0; t < T; t++)
    for (int r = 0; r < kRows; r++) {
      float sum = total(a[t][r] + b[t][r]);
      for (int64_t j = i; j < width; j++) sum += As<F>::one(rows[r], j) * x[t * width + j];
      out[t][r] = F == Format::int8 ? sum * *rows[r].scale : sum;
    }
}

template <Format F, int T>
void dot_tokens(const Weights& w, const Chosen& chosen, int64_t begin, int64_t end, const float* x, float* out,
                int64_t out_stride) {
  Row rows[kRows], next[kRows];
  find(w, chosen, begin, end, next);
  for (int64_t i = begin; i < end; i += kRows) {
    std::copy(next, next + kRows, rows);
    find(w, chosen, std::min(i + kRows, end - 1), end, next);
    float found[T][kRows];
    dot_tile<F, T>(rows, next, w.width, x, found);
    for (int t = 0; t < T; t++)
      for (int r = 0; r < kRows && i + r < end; r++) out[t * out_stride + i + r - begin] = found[t][r];
  }
}

template <Format F>
void dot_format(const Weights& w, const Chosen& chosen, int64_t begin, int64_t end, const float* x, int64_t tokens,
                float* out, int64_t out_stride) {
  int64_t t = 0;
  for (; t + 2 <= tokens; t += 2)
    dot_tokens<F, 2>(w, chosen, begin, end, x + t * w.width, out + t * out_stride, out_stride);
  if (t < tokens) dot_tokens<F, 1>(w, chosen, begin, end, x + t * w.width, out + t * out_stride, out_stride);
}

// y[j] += sum over r of h[r] * row[r][first + j], for j in [0, size).
template <Format F>
void sum_tile(const Row* rows, const Row* next, const float* h, int64_t first, int64_t size, float* y) {
  int64_t j = 0;
  for (; j + V <= size; j += V) {
    ask(next, bytes_of(F, first + j), bytes_of(F, V));
    vf sum = load<vf>(y + j);
    for (int r = 0; r < kRows; r++) sum += h[r] * As<F>::vector(rows[r], first + j);
    store(y + j, sum);
  }
  for (; j < size; j++)
    for (int r = 0; r < kRows; r++) y[j] += h[r] * As<F>::one(rows[r], first + j);
}

template <Format F>
void sum_format(const Weights& w, const Chosen& chosen, int64_t count, const float* h, int64_t h_stride, int64_t tokens,
                int64_t first, int64_t last, float* y) {
  Row rows[kRows], next[kRows];
  for (int64_t start = first; start < last; start += kTile) {
    const int64_t size = std::min(kTile, last - start);
    for (int64_t t = 0; t < tokens; t++) std::fill_n(y + t * w.width + start, size, 0.0f);
    if (count > 0) find(w, chosen, 0, count, next);
    for (int64_t i = 0; i < count; i += kRows) {
      std::copy(next, next + kRows, rows);
      find(w, chosen, std::min(i + kRows, count - 1), count, next);
      for (int64_t t = 0; t < tokens; t++) {
        float factor[kRows];
        for (int r = 0; r < kRows; r++) {
          factor[r] = i + r < count ? h[t * h_stride + i + r] : 0.0f;
          if (F == Format::int8) factor[r] *= *rows[r].scale;
        }
        sum_tile<F>(rows, next, factor, start, size, y + t * w.width + start);
      }
    }
  }
}

void dot(const Weights& w, const Chosen& chosen, int64_t begin, int64_t end, const float* x, int64_t tokens, float* out,
         int64_t out_stride) {
  switch (w.format) {
    case Format::float32: return dot_format<Format::float32>(w, chosen, begin, end, x, tokens, out, out_stride);
    case Format::float16: return dot_format<Format::float16>(w, chosen, begin, end, x, tokens, out, out_stride);
    case Format::bfloat16: return dot_format<Format::bfloat16>(w, chosen, begin, end, x, tokens, out, out_stride);
    case Format::int8: return dot_format<Format::int8>(w, chosen, begin, end, x, tokens, out, out_stride);
    case Format::int4: return dot_format<Format::int4>(w, chosen, begin, end, x, tokens, out, out_stride);
  }
}

void sum(const Weights& w, const Chosen& chosen, int64_t count, const float* h, int64_t h_stride, int64_t tokens,
         int64_t first, int64_t last, float* y) {
  switch (w.format) {
    case Format::float32: return sum_format<Format::float32>(w, chosen, count, h, h_stride, tokens, first, last, y);
    case Format::float16: return sum_format<Format::float16>(w, chosen, count, h, h_stride, tokens, first, last, y);
    case Format::bfloat16: return sum_format<Format::bfloat16>(w, chosen, count, h, h_stride, tokens, first, last, y);
    case Format::int8: return sum_format<Format::int8>(w, chosen, count, h, h_stride, tokens, first, last, y);
    case Format::int4: return sum_format<Format::int4>(w, chosen, count, h, h_stride, tokens, first, last, y);
  }
}

}  // namespace

const Kernels TRIMTAB_KERNELS = {TRIMTAB_ISA, dot, sum};

}  // namespace trimtab
