// Many tokens that take the same rows, as those of a prompt do: products in float32, whatever the weights.
//
// Arithmetic takes the time here, not memory. Weights are widened once for kTokens tokens, into pieces that the first cache
// holds while they are multiplied with each of these, kTile of them at once: as many sums as there are registers for.
#pragma once

#include <algorithm>
#include <vector>

#include "kernel_float.h"
#include "vector_math.h"

namespace trimtab {
namespace {

constexpr int64_t kTokens = 96;   // whose activations stay in the second cache
constexpr int64_t kDepth = 512;   // places of a row, or rows, that are multiplied before the sums are put down
constexpr int64_t kColumns = 96;  // of the output that are summed at a time: whole tiles for each width of vectors

constexpr int64_t kPadded = kDepth + 16;  // so that neighbours do not fall into the same places of a cache

constexpr int kDotTokens = 6, kPanelVectors = 2;  // a tile of `dot`
constexpr int64_t kPanel = kPanelVectors * V;     // rows that it has
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

// Places first to first + size of V rows from the i-th chosen on (the last again where there are no more), turned round:
// panel[p * kPanel + r] is place first + p of row r.
inline void turn(const Weights& w, const Chosen& chosen, int64_t i, int64_t end, int64_t first, int64_t size, float* panel) {
  constexpr int64_t kPiece = 4 * kInt4Block;
  static_assert(kPiece % V == 0, "whole squares");
  static thread_local float piece[V * kPiece];
  int64_t whole = 0;
  if (w.format == Format::float32) {
    const float* rows[V];
    for (int r = 0; r < V; r++)
      rows[r] = static_cast<const float*>(w.data) + chosen.row(std::min(i + r, end - 1)) * w.width + first;
    for (; whole + V <= size; whole += V) {
      vf square[V];
      TRIMTAB_UNROLL_ALL for (int r = 0; r < V; r++) square[r] = load<vf>(rows[r] + whole);
      transpose(square);
      TRIMTAB_UNROLL_ALL for (int r = 0; r < V; r++) store(panel + (whole + r) * kPanel, square[r]);
    }
  }
  for (int64_t p = whole; p < size; p += kPiece) {
    const int64_t some = std::min(kPiece, size - p);
    for (int r = 0; r < V; r++) widen(w, chosen.row(std::min(i + r, end - 1)), first + p, some, piece + r * kPiece);
    for (int64_t q = 0; q < some; q += V) {
      vf square[V];
      TRIMTAB_UNROLL_ALL for (int r = 0; r < V; r++) square[r] = load<vf>(piece + r * kPiece + q);
      transpose(square);
      TRIMTAB_UNROLL_ALL for (int r = 0; r < V; r++) store(panel + (p + q + r) * kPanel, square[r]);
    }
  }
}

// part[t][j] = sum over p of x[t][p] * panel[p][j], for the kPanel rows of a panel.
template <int T>
void dot_tile(const float* x, const float* panel, int64_t size, float* part) {
  vf sums[T][kPanelVectors] = {};
  for (int64_t p = 0; p < size; p++, panel += kPanel) {
    vf w[kPanelVectors];
    TRIMTAB_UNROLL for (int v = 0; v < kPanelVectors; v++) w[v] = load<vf>(panel + v * V);
    TRIMTAB_UNROLL for (int t = 0; t < T; t++) {
      const float by = x[t * kPadded + p];
      TRIMTAB_UNROLL for (int v = 0; v < kPanelVectors; v++) sums[t][v] += by * w[v];
    }
  }
  TRIMTAB_UNROLL for (int t = 0; t < T; t++)
    TRIMTAB_UNROLL for (int v = 0; v < kPanelVectors; v++) store(part + t * kPanel + v * V, sums[t][v]);
}

// As Kernels::dot. Rows are turned round, so that a tile's sums are vectors of outputs.
inline void dot_many(const Weights& w, const Chosen& chosen, int64_t begin, int64_t end, const float* x, int64_t tokens,
                     float* out, int64_t out_stride, const int32_t* numbers) {
  constexpr decltype(&dot_tile<1>) kTiles[] = {nullptr,     dot_tile<1>, dot_tile<2>, dot_tile<3>,
                                               dot_tile<4>, dot_tile<5>, dot_tile<6>};
  alignas(64) static thread_local float panel[(kDepth + V) * kPanel], packed[kTokens * kPadded], part[kPanel * kDotTokens];
  for (int64_t t0 = 0; t0 < tokens; t0 += kTokens)
    for (int64_t k = 0; k < w.width; k += kDepth) {
      const int64_t size = std::min(kDepth, w.width - k), some = std::min(kTokens, tokens - t0);
      const int64_t each = (size * kDotTokens / some + 31) / 16 * 16;  // of the next rows, asked for with each tile
      for (int64_t t = 0; t < some; t++)
        std::copy_n(x + (numbers == nullptr ? t0 + t : numbers[t0 + t]) * w.width + k, size, packed + t * kPadded);
      for (int64_t i = begin; i < end; i += kPanel) {
        const int64_t rows = std::min(kPanel, end - i);
        for (int64_t r = 0; r < kPanel; r += V) turn(w, chosen, i + std::min(r, rows - 1), end, k, size, panel + r);
        int64_t asked = 0;
        for (int64_t t = 0; t < some; t += kDotTokens) {
          for (int64_t r = 0; r < kPanel && i + kPanel < end; r++)
            ask(w, chosen.row(std::min(i + kPanel + r, end - 1)), k + asked, std::min(each, size - asked));
          asked = std::min(asked + each, size);
          const int64_t count = std::min<int64_t>(kDotTokens, some - t);
          kTiles[count](packed + t * kPadded, panel, size, part);
          for (int64_t j = 0; j < count; j++) {
            float* to = out + (t0 + t + j) * out_stride + i - begin;
            const float* from = part + j * kPanel;
            for (int64_t r = 0; r < rows; r++) to[r] = k == 0 ? from[r] : to[r] + from[r];
          }
        }
      }
    }
}

// part[t][j] += sum over i of h[t][i] * panel[i][j], for a tile of columns; `stride` from row to row of the panel.
template <int T>
void sum_tile(const float* const* h, const float* panel, int64_t stride, int64_t count, float* const* part) {
  vf sums[T][kSumVectors];
  TRIMTAB_UNROLL for (int t = 0; t < T; t++)
    TRIMTAB_UNROLL for (int v = 0; v < kSumVectors; v++) sums[t][v] = load<vf>(part[t] + v * V);
  for (int64_t i = 0; i < count; i++, panel += stride) {
    vf w[kSumVectors];
    TRIMTAB_UNROLL for (int v = 0; v < kSumVectors; v++) w[v] = load<vf>(panel + v * V);
    TRIMTAB_UNROLL for (int t = 0; t < T; t++) {
      const float by = h[t][i];
      TRIMTAB_UNROLL for (int v = 0; v < kSumVectors; v++) sums[t][v] += by * w[v];
    }
  }
  TRIMTAB_UNROLL for (int t = 0; t < T; t++)
    TRIMTAB_UNROLL for (int v = 0; v < kSumVectors; v++) store(part[t] + v * V, sums[t][v]);
}

constexpr decltype(&sum_tile<1>) kSumTiles[] = {nullptr, sum_tile<1>, sum_tile<2>, sum_tile<3>, sum_tile<4>};

// Columns column to column + size of a row, as floats, into a panel of `rows` rows at place r.
inline void to_panel(const Weights& w, int64_t row, int64_t column, int64_t size, int64_t rows, int64_t r, float* panel) {
  constexpr int64_t kWide = kSumVectors * V;
  if (size == kColumns && w.format != Format::int4) {
    for (int64_t c = 0; c < kColumns; c += kWide) widen(w, row, column + c, kWide, panel + c * rows + r * kWide);
    return;
  }
  float line[kColumns] = {};
  widen(w, row, column, size, line);
  for (int64_t c = 0; c < kColumns; c += kWide) std::copy_n(line + c, kWide, panel + c * rows + r * kWide);
}

// As Kernels::sum.
inline void sum_many(const Weights& w, const Chosen& chosen, int64_t count, const float* h, int64_t h_stride,
                     int64_t tokens, int64_t first, int64_t last, float* y) {
  constexpr int64_t kWide = kSumVectors * V, kRows = kDepth, kAsked = 4;
  static_assert(kColumns % kWide == 0 && kColumns % kInt4Block == 0, "whole tiles, and whole blocks of int4");
  static thread_local float panel[kRows * kColumns], part[kTokens * kColumns];
  for (int64_t t0 = 0; t0 < tokens; t0 += kTokens)
    for (int64_t column = first; column < last; column += kColumns) {
      const int64_t size = std::min(kColumns, last - column), some = std::min(kTokens, tokens - t0);
      std::fill_n(part, some * kColumns, 0.0f);
      for (int64_t i = 0; i < count; i += kRows) {
        const int64_t rows = std::min(kRows, count - i);
        for (int64_t r = 0; r < rows; r++) to_panel(w, chosen.row(i + r), column, size, rows, r, panel);
        int64_t next = std::min(i + kRows, count);
        for (int64_t c = 0; c < kColumns; c += kWide)
          for (int64_t t = 0; t < some; t += kSumTokens) {
            for (const int64_t last_one = std::min(next + kAsked, count); next < last_one; next++)
              ask(w, chosen.row(next), column, size);
            const float* from[kSumTokens];
            float* to[kSumTokens];
            for (int j = 0; j < kSumTokens; j++) from[j] = h + (t0 + t + j) * h_stride + i, to[j] = part + (t + j) * kColumns + c;
            kSumTiles[std::min<int64_t>(kSumTokens, some - t)](from, panel + c * rows, kWide, rows, to);
          }
      }
      for (int64_t t = 0; t < some; t++) std::copy_n(part + t * kColumns, size, y + (t0 + t) * w.width + column);
    }
}

// As Kernels::sum_by_block, for blocks that many tokens take: a block's rows are read from end to end while they are added
// to all who take them.
inline void sum_many_by_block(const Weights& w, const Takers& takers, const float* h, int64_t h_stride, int64_t tokens,
                              int64_t first, int64_t last, float* y) {
  constexpr int64_t kWide = kSumVectors * V, kRows = kDepth;
  alignas(64) static thread_local float panel[kRows * kColumns];
  for (int64_t t = 0; t < tokens; t++) std::fill(y + t * w.width + first, y + t * w.width + last, 0.0f);
  for (int64_t b = 0; b < takers.count; b++)
    for (int64_t i = 0; i < takers.size; i += kRows) {
      const int64_t rows = std::min(kRows, takers.size - i), row = takers.blocks[b] * takers.size + i;
      const int64_t end = takers.starts[b + 1];
      for (int64_t column = first; column < last; column += kColumns) {
        const int64_t size = std::min(kColumns, last - column);
        const bool as_it_is = w.format == Format::float32 && size == kColumns;
        const float* there = static_cast<const float*>(w.data) + row * w.width + column;
        for (int64_t r = 0; r < rows; r++) {
          if (!as_it_is) to_panel(w, row + r, column, size, rows, r, panel);
          if (b + 1 < takers.count) ask(w, takers.blocks[b + 1] * takers.size + i + r, column, size);
        }
        for (int64_t t = takers.starts[b]; t < end; t += kSumTokens) {
          const int64_t some = std::min<int64_t>(kSumTokens, end - t);
          const float* from[kSumTokens];
          float* to[kSumTokens];
          for (int64_t j = 0; j < some; j++) {
            from[j] = h + takers.tokens[t + j] * h_stride + takers.places[t + j] * takers.size + i;
            to[j] = y + takers.tokens[t + j] * w.width + column;
          }
          for (int64_t c = 0; c < size; c += kWide) {
            const int64_t stride = as_it_is ? w.width : kWide, left = std::min(kWide, size - c);
            const float* weights = as_it_is ? there + c : panel + c * rows;
            if (left == kWide) {
              kSumTiles[some](from, weights, stride, rows, to);
            } else {  // the end of a row
              float part[kSumTokens][kWide] = {};
              float* at[kSumTokens];
              for (int64_t j = 0; j < some; j++) at[j] = std::copy_n(to[j], left, part[j]) - left;
              kSumTiles[some](from, weights, stride, rows, at);
              for (int64_t j = 0; j < some; j++) std::copy_n(at[j], left, to[j]);
            }
            for (int64_t j = 0; j < some; j++) to[j] += kWide;
          }
        }
      }
    }
}

}  // namespace
}  // namespace trimtab
