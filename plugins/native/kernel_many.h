// Many tokens that take the same rows, as those of a prompt do: products in float32, whatever the weights.
//
// Arithmetic takes the time here, not memory. Weights are widened once for kTokens tokens, into pieces that the first cache
// holds while they are multiplied with each of these, kTile of them at once: as many sums as there are registers for.
#pragma once

#include <algorithm>

#include "kernel_float.h"

namespace trimtab {
namespace {

constexpr int64_t kTokens = 96;   // whose activations stay in the second cache
constexpr int64_t kDepth = 512;   // places of a row, or rows, that are multiplied before the sums are put down
constexpr int64_t kColumns = 96;  // of the output that are summed at a time: whole tiles for each width of vectors

constexpr int64_t kPadded = kDepth + 16;  // so that neighbours do not fall into the same places of a cache

constexpr int kDotTokens = 3, kDotRows = 4;   // a tile of `dot`
constexpr int kSumTokens = 4, kSumVectors = 3;  // a tile of `sum`

typedef int8_t vb __attribute__((vector_size(V)));

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

// Asks for places first to first + size of a row.
inline void ask(const Weights& w, int64_t row, int64_t first, int64_t size) {
  const char* data = static_cast<const char*>(w.data) + bytes_of(w.format, row * w.width + first);
  for (int64_t i = 0; i < bytes_of(w.format, size); i += 64) __builtin_prefetch(data + i);
}

template <Format F>
void widen_floats(const char* row, int64_t first, int64_t size, float* out) {
  int64_t i = 0;
  for (; i + V <= size; i += V) store(out + i, As<F>::vector(row, first + i));
  for (; i < size; i++) out[i] = As<F>::one(row, first + i);
}

// Places first to first + size of a row as floats; of int4, both are multiples of its blocks.
inline void widen(const Weights& w, int64_t row, int64_t first, int64_t size, float* out) {
  const char* data = static_cast<const char*>(w.data) + bytes_of(w.format, row * w.width);
  switch (w.format) {
    case Format::float32: return widen_floats<Format::float32>(data, first, size, out);
    case Format::float16: return widen_floats<Format::float16>(data, first, size, out);
    case Format::bfloat16: return widen_floats<Format::bfloat16>(data, first, size, out);
    case Format::int8: {
      const auto* from = reinterpret_cast<const int8_t*>(data) + first;
      for (int64_t i = 0; i < size; i++) out[i] = static_cast<float>(from[i]) * w.scale[row];
      return;
    }
    case Format::int4: {
      const auto* from = reinterpret_cast<const uint8_t*>(data) + first / 2;
      const float* scale = w.scale + (row * w.width + first) / kInt4Block;
      for (int64_t b = 0; b < size / kInt4Block; b++, from += kInt4Block / 2, out += kInt4Block) {
        int8_t block[kInt4Block];
        unpack(from, block);
        for (int i = 0; i < kInt4Block; i += V)
          store(out + i, __builtin_convertvector(load<vb>(block + i), vf) * scale[b]);
      }
    }
  }
}

// found[t][r] = x[t] . row[r] over `size` places; both have kPadded floats from one to the next.
template <int T>
void dot_tile(const float* x, const float* rows, int64_t size, float found[][kDotRows]) {
  vf sums[T][kDotRows] = {};
  int64_t i = 0;
  for (; i + V <= size; i += V) {
    vf v[T];
    TRIMTAB_UNROLL for (int t = 0; t < T; t++) v[t] = load<vf>(x + t * kPadded + i);
    TRIMTAB_UNROLL for (int r = 0; r < kDotRows; r++) {
      const vf w = load<vf>(rows + r * kPadded + i);
      TRIMTAB_UNROLL for (int t = 0; t < T; t++) sums[t][r] += v[t] * w;
    }
  }
  TRIMTAB_UNROLL for (int t = 0; t < T; t++)
    TRIMTAB_UNROLL for (int r = 0; r < kDotRows; r++) {
      found[t][r] = total(sums[t][r]);
      for (int64_t j = i; j < size; j++) found[t][r] += x[t * kPadded + j] * rows[r * kPadded + j];
    }
}

// As Kernels::dot.
inline void dot_many(const Weights& w, const Chosen& chosen, int64_t begin, int64_t end, const float* x, int64_t tokens,
                     float* out, int64_t out_stride) {
  constexpr decltype(&dot_tile<1>) kTiles[] = {nullptr, dot_tile<1>, dot_tile<2>, dot_tile<3>};
  static thread_local float rows[kDotRows * kPadded], packed[kTokens * kPadded];
  for (int64_t t0 = 0; t0 < tokens; t0 += kTokens)
    for (int64_t k = 0; k < w.width; k += kDepth) {
      const int64_t size = std::min(kDepth, w.width - k), last = std::min(tokens, t0 + kTokens);
      const int64_t each = (size * kDotTokens / (last - t0) + 31) / 16 * 16;  // of the next rows, asked for with each tile
      for (int64_t t = t0; t < last; t++) std::copy_n(x + t * w.width + k, size, packed + (t - t0) * kPadded);
      for (int64_t i = begin; i < end; i += kDotRows) {
        for (int r = 0; r < kDotRows; r++) widen(w, chosen.row(std::min(i + r, end - 1)), k, size, rows + r * kPadded);
        int64_t asked = 0;
        for (int64_t t = t0; t < last; t += kDotTokens) {
          const int64_t count = std::min<int64_t>(kDotTokens, last - t);
          for (int r = 0; r < kDotRows; r++)
            ask(w, chosen.row(std::min(i + kDotRows + r, end - 1)), k + asked, std::min(each, size - asked));
          asked = std::min(asked + each, size);
          float found[kDotTokens][kDotRows];
          kTiles[count](packed + (t - t0) * kPadded, rows, size, found);
          for (int64_t j = 0; j < count; j++)
            for (int r = 0; r < kDotRows && i + r < end; r++) {
              float& to = out[(t + j) * out_stride + i + r - begin];
              to = k == 0 ? found[j][r] : to + found[j][r];
            }
        }
      }
    }
}

// part[t][j] += sum over i of h[t][i] * panel[i][j], for a tile of columns; `part` has kColumns from token to token.
template <int T>
void sum_tile(const float* h, int64_t h_stride, const float* panel, int64_t count, float* part) {
  vf sums[T][kSumVectors];
  TRIMTAB_UNROLL for (int t = 0; t < T; t++)
    TRIMTAB_UNROLL for (int v = 0; v < kSumVectors; v++) sums[t][v] = load<vf>(part + t * kColumns + v * V);
  for (int64_t i = 0; i < count; i++, panel += kSumVectors * V) {
    vf w[kSumVectors];
    TRIMTAB_UNROLL for (int v = 0; v < kSumVectors; v++) w[v] = load<vf>(panel + v * V);
    TRIMTAB_UNROLL for (int t = 0; t < T; t++) {
      const float by = h[t * h_stride + i];
      TRIMTAB_UNROLL for (int v = 0; v < kSumVectors; v++) sums[t][v] += by * w[v];
    }
  }
  TRIMTAB_UNROLL for (int t = 0; t < T; t++)
    TRIMTAB_UNROLL for (int v = 0; v < kSumVectors; v++) store(part + t * kColumns + v * V, sums[t][v]);
}

// As Kernels::sum.
inline void sum_many(const Weights& w, const Chosen& chosen, int64_t count, const float* h, int64_t h_stride,
                     int64_t tokens, int64_t first, int64_t last, float* y) {
  constexpr decltype(&sum_tile<1>) kTiles[] = {nullptr, sum_tile<1>, sum_tile<2>, sum_tile<3>, sum_tile<4>};
  constexpr int64_t kWide = kSumVectors * V, kRows = kDepth / 2, kAsked = 4;
  static_assert(kColumns % kWide == 0 && kColumns % kInt4Block == 0, "whole tiles, and whole blocks of int4");
  static thread_local float panel[kRows * kColumns], part[kTokens * kColumns];
  for (int64_t t0 = 0; t0 < tokens; t0 += kTokens)
    for (int64_t column = first; column < last; column += kColumns) {
      const int64_t size = std::min(kColumns, last - column), some = std::min(kTokens, tokens - t0);
      std::fill_n(part, some * kColumns, 0.0f);
      for (int64_t i = 0; i < count; i += kRows) {
        const int64_t rows = std::min(kRows, count - i);
        for (int64_t r = 0; r < rows; r++) {
          float line[kColumns] = {};
          widen(w, chosen.row(i + r), column, size, line);
          for (int64_t c = 0; c < kColumns; c += kWide) std::copy_n(line + c, kWide, panel + c * rows + r * kWide);
        }
        int64_t next = std::min(i + kRows, count);
        for (int64_t c = 0; c < kColumns; c += kWide)
          for (int64_t t = 0; t < some; t += kSumTokens) {
            for (const int64_t last_one = std::min(next + kAsked, count); next < last_one; next++)
              ask(w, chosen.row(next), column, size);
            kTiles[std::min<int64_t>(kSumTokens, some - t)](h + (t0 + t) * h_stride + i, h_stride, panel + c * rows, rows,
                                                            part + t * kColumns + c);
          }
      }
      for (int64_t t = 0; t < some; t++) std::copy_n(part + t * kColumns, size, y + (t0 + t) * w.width + column);
    }
}

}  // namespace
}  // namespace trimtab
