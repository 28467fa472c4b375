// Rows that several tokens take, multiplied in float32. Formats in floating point are widened as they are multiplied; int4,
// and int8 where bytes are not multiplied, into a panel of floats before.
#pragma once

#include <array>
#include <utility>
#include <vector>

#include "tile_float.h"
#include "widen.h"

namespace trimtab {
namespace {

constexpr int64_t kDepth = 1024;  // places of a row that are multiplied before the sums are put down
constexpr int64_t kPanelWide = 128;  // columns that are widened at a time
static_assert(kPanelWide % kSumWide == 0 && kPanelWide % kInt4Block == 0, "whole tiles, and whole blocks of int4");

using DotTile = void (*)(const char* const*, const float* const*, int64_t, float (*)[kDotRows], Lines&, int64_t);
using SumTile = void (*)(const char* const*, int64_t, int64_t, const float* const*, float* const*, Lines&, int64_t);

template <Format F, int... T>
constexpr std::array<DotTile, sizeof...(T)> dot_tiles(std::integer_sequence<int, T...>) {
  return {dot_tile<F, T + 1>...};
}
template <Format F, int... T>
constexpr std::array<SumTile, sizeof...(T)> sum_tiles(std::integer_sequence<int, T...>) {
  return {sum_tile<F, T + 1>...};
}
template <Format F>
struct FloatTiles {
  static constexpr auto dot = dot_tiles<F>(std::make_integer_sequence<int, kDotTokens>());
  static constexpr auto sum = sum_tiles<F>(std::make_integer_sequence<int, kSumTokens>());
};

// Calls use(tiles) with those of a format, or of float32 where rows are widened before.
template <typename Use>
void with_tiles(Format format, const Use& use) {
  switch (format) {
    case Format::float16: return use(FloatTiles<Format::float16>());
    case Format::bfloat16: return use(FloatTiles<Format::bfloat16>());
    default: return use(FloatTiles<Format::float32>());
  }
}


// out[t][r] = (or +=) x[t] . row[r] for places `first` to first + size.
void dot_piece(const Chunk& now, const Chunk& next, int64_t next_first, const Activations& x, const int64_t* numbers,
               int64_t tokens, int64_t first, int64_t size, float* out, int64_t out_stride) {
  static thread_local std::vector<float> panel;
  const Weights& w = *now.w;
  const char* rows[kChunk];
  const bool widened = is_integer(w.format);
  if (widened) panel.resize(kChunk * kDepth);
  for (int64_t r = 0; r < now.tiled(); r++) {
    rows[r] = widened ? reinterpret_cast<const char*>(panel.data() + r * kDepth) : now.row[r].data + bytes_of(w.format, first);
    if (widened) widen(w, now.row[r], first, size, panel.data() + r * kDepth);
  }
  Lines ahead(next, next_first, next.count == 0 ? 0 : std::min(size, next.w->width - next_first));
  const int64_t lines = lines_in(kDotRows * bytes_of(w.format, V), (tokens + kDotTokens - 1) / kDotTokens);
  with_tiles(widened ? Format::float32 : w.format, [&](auto kind) {
    in_tiles(tokens, kDotTokens, [&](int64_t t, int64_t some) {
      const float* from[kDotTokens];
      for (int64_t j = 0; j < some; j++) from[j] = x.floats + numbers[t + j] * w.width + first;
      for (int64_t r = 0; r < now.count; r += kDotRows) {
        float made[kDotTokens][kDotRows];
        kind.dot[some - 1](rows + r, from, size, made, ahead, lines);
        for (int64_t j = 0; j < some; j++)
          put_down(load<four>(made[j]), first == 0, now.count - r, out + (t + j) * out_stride + r);
      }
    });
  });
}

// As Kernels::dot, for some tokens.
inline void dot_many(const Weights& w, const Chosen& chosen, int64_t begin, int64_t end, const Activations& x, int64_t tokens,
                     float* out, int64_t out_stride, const Wanted& next, const int32_t* numbers) {
  for (int64_t t0 = 0; t0 < tokens; t0 += kTogether) {
    const int64_t some = std::min(kTogether, tokens - t0);
    int64_t mine[kTogether];
    for (int64_t t = 0; t < some; t++) mine[t] = numbers == nullptr ? t0 + t : numbers[t0 + t];
    // One tile's rows of x pass once for all of a row: longer reads, and nothing is put down in between.
    const int64_t depth = some <= kDotTokens && !is_integer(w.format) ? w.width : kDepth;
    for (int64_t i = begin; i < end; i += kChunk) {
      const Chunk now(&w, chosen, i, end), after = behind(w, chosen, i, end, next);
      for (int64_t first = 0; first < w.width; first += depth) {
        const bool more = first + depth < w.width;
        dot_piece(now, more ? now : after, more ? first + depth : 0, x, mine, some, first, std::min(depth, w.width - first),
                  out + t0 * out_stride + i - begin, out_stride);
      }
    }
  }
}

// y[t][begin..end) += sum over the rows of h[t][i] * row[i][begin..end).
void sum_floats(const Chunk& now, const Chunk& next, const float* const* h, float* const* y, int64_t tokens, int64_t begin, int64_t end) {
  alignas(64) static thread_local float panel[kChunk * kPanelWide];
  const Weights& w = *now.w;
  const int64_t strips = (end - begin + kPanelWide - 1) / kPanelWide;
  const int64_t lines = lines_in(bytes_of(w.format, kSumWide), (tokens + kSumTokens - 1) / kSumTokens);
  Lines ahead(next, begin, end - begin);
  for (int64_t strip = 0; strip < strips; strip++) {
    const int64_t column = begin + strip * kPanelWide, size = std::min(kPanelWide, end - column);
    const bool widened = is_integer(w.format) || size % kSumWide != 0;
    const char* rows[kChunk];
    for (int64_t r = 0; r < now.count; r++) {
      float* line = panel + r * kPanelWide;
      rows[r] = widened ? reinterpret_cast<const char*>(line) : now.row[r].data;
      if (!widened) continue;
      if (size % kSumWide != 0) std::fill_n(line, kPanelWide, 0.0f);
      widen(w, now.row[r], column, size, line);
    }
    with_tiles(widened ? Format::float32 : w.format, [&](auto kind) {
      for (int64_t c = 0; c < size; c += kSumWide)
        in_tiles(tokens, kSumTokens, [&](int64_t t, int64_t some) {
          const int64_t wide = std::min(kSumWide, size - c);
          float last[kSumTokens][kSumWide], *to[kSumTokens];
          for (int64_t j = 0; j < some; j++) {
            to[j] = wide == kSumWide ? y[t + j] + column + c : last[j];
            if (wide < kSumWide) std::copy_n(y[t + j] + column + c, wide, last[j]);
          }
          kind.sum[some - 1](rows, widened ? c : column + c, now.count, h + t, to, ahead, lines);
          if (wide < kSumWide)
            for (int64_t j = 0; j < some; j++) std::copy_n(last[j], wide, y[t + j] + column + c);
        });
    });
  }
}

// As Kernels::sum, for some tokens.
inline void sum_many(const Weights& w, const Chosen& chosen, int64_t count, const float* h, int64_t h_stride,
                     int64_t tokens, int64_t first, int64_t last, float* y) {
  const int64_t strip = sum_strip(std::min(tokens, kTogether));
  for (int64_t t0 = 0; t0 < tokens; t0 += kTogether)
    for (int64_t column = first; column < last; column += strip) {
      const int64_t end = std::min(column + strip, last), some = std::min(kTogether, tokens - t0);
      float* to[kTogether];
      const float* from[kTogether];
      for (int64_t t = 0; t < some; t++) {
        to[t] = y + (t0 + t) * w.width;
        std::fill(to[t] + column, to[t] + end, 0.0f);
      }
      for (int64_t i = 0; i < count; i += kChunk) {
        for (int64_t t = 0; t < some; t++) from[t] = h + (t0 + t) * h_stride + i;
        sum_floats(Chunk(&w, chosen, i, count), behind(w, chosen, i, count, {}), from, to, some, column, end);
      }
    }
}

// As Kernels::sum_by_block, for blocks that several tokens take.
inline void sum_many_by_block(const Weights& w, const Takers& takers, const float* h, int64_t h_stride, int64_t tokens,
                              int64_t first, int64_t last, float* y) {
  const int64_t strip = sum_strip(tokens);
  for (int64_t column = first; column < last; column += strip) {
    const int64_t end = std::min(column + strip, last);
    for (int64_t t = 0; t < tokens; t++) std::fill(y + t * w.width + column, y + t * w.width + end, 0.0f);
    each_chunk(w, takers, [&](int64_t b, int64_t i, const Chunk& now, const Chunk& next) {
      const float* from[kTogether];
      float* to[kTogether];
      for (int64_t at = takers.starts[b]; at < takers.starts[b + 1];) {
        int64_t some = 0;
        for (; some < kTogether && at < takers.starts[b + 1]; some++, at++) {
          from[some] = h + takers.tokens[at] * h_stride + takers.places[at] * takers.size + i;
          to[some] = y + takers.tokens[at] * w.width;
        }
        sum_floats(now, next, from, to, some, column, end);
      }
    });
  }
}

}  // namespace
}  // namespace trimtab
