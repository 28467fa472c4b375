// Weights of any format as floats.
#pragma once

#include "kernel_float.h"

namespace trimtab {
namespace {

// A block of int4, two to a byte, as bytes from -8 to 7.
inline void unpack(const uint8_t* from, int8_t* out) {
#if defined(__SSE2__)
  const __m128i both = load<__m128i>(from), mask = _mm_set1_epi8(15), zero = _mm_set1_epi8(8);
  const __m128i low = _mm_and_si128(both, mask), high = _mm_and_si128(_mm_srli_epi16(both, 4), mask);
  const __m128i first = _mm_sub_epi8(_mm_unpacklo_epi8(low, high), zero);
  const __m128i second = _mm_sub_epi8(_mm_unpackhi_epi8(low, high), zero);
  std::memcpy(out, &first, sizeof first);
  std::memcpy(out + sizeof first, &second, sizeof second);
#else
  for (int i = 0; i < kInt4Block / 2; i++) {
    out[2 * i] = static_cast<int8_t>((from[i] & 15) - 8);
    out[2 * i + 1] = static_cast<int8_t>((from[i] >> 4) - 8);
  }
#endif
}

template <Format F>
void widen_floats(const char* row, int64_t first, int64_t size, float* out) {
  int64_t i = 0;
  for (; i + V <= size; i += V) store(out + i, As<F>::vector(row, first + i));
  for (; i < size; i++) out[i] = As<F>::one(row, first + i);
}

// Places first to first + size of a row as floats; of int4, both are multiples of its blocks.
inline void widen(const Weights& w, const Row& row, int64_t first, int64_t size, float* out) {
  switch (w.format) {
    case Format::float32: return widen_floats<Format::float32>(row.data, first, size, out);
    case Format::float16: return widen_floats<Format::float16>(row.data, first, size, out);
    case Format::bfloat16: return widen_floats<Format::bfloat16>(row.data, first, size, out);
    case Format::int8: {
      const auto* from = reinterpret_cast<const int8_t*>(row.data) + first;
      for (int64_t i = 0; i < size; i++) out[i] = static_cast<float>(from[i]) * *row.scale;
      return;
    }
    case Format::int4: {
      const auto* from = reinterpret_cast<const uint8_t*>(row.data) + first / 2;
      const float* scale = row.scale + first / kInt4Block;
      for (int64_t b = 0; b < size / kInt4Block; b++, from += kInt4Block / 2, out += kInt4Block) {
        int8_t block[kInt4Block];
        unpack(from, block);
        for (int i = 0; i < kInt4Block; i += V)
          store(out + i, __builtin_convertvector(load<vb>(block + i), vf) * scale[b]);
      }
    }
  }
}

}  // namespace
}  // namespace trimtab
