// The kernels that multiply bytes, in vectors of TRIMTAB_WIDTH floats; TRIMTAB_VNNI: directly. Included by one source file per
// instruction set that can.
#include <array>
#include <utility>
#include <vector>

#include "tile_bytes.h"

namespace trimtab {
namespace {

using DotBytes = void (*)(const char* const*, const int8_t* const*, int64_t, int32_t (*)[kDotRows], Lines&, int64_t);
using SumBytes = void (*)(const vi*, int64_t, const BlockBytes*, int64_t, float* const*);

template <int... T>
constexpr std::array<DotBytes, sizeof...(T)> dot_bytes_tiles(std::integer_sequence<int, T...>) {
  return {dot_bytes<T + 1>...};
}
template <int... T>
constexpr std::array<SumBytes, sizeof...(T)> sum_bytes_tiles(std::integer_sequence<int, T...>) {
  return {sum_bytes<T + 1>...};
}

void prepare_bytes(const float* x, int64_t width, int8_t* bytes, float* scale, int32_t* sums) {
  for (int64_t begin = 0; begin < width; begin += kByteGroup) {
    const int64_t size = std::min(kByteGroup, width - begin);
    *scale++ = round_bytes(x + begin, nullptr, size, byte_stride(size), bytes + begin, sums++);
  }
}

void dot_by_bytes(const Weights& w, const Chosen& chosen, int64_t begin, int64_t end, const Activations& x, int64_t tokens,
              float* out, int64_t out_stride, const Wanted& next, const int32_t* numbers) {
  static constexpr auto tiles = dot_bytes_tiles(std::make_integer_sequence<int, kDotTokens>());
  const int64_t stride = byte_stride(w.width), groups = byte_groups(w.width);
  for (int64_t i = begin; i < end; i += kChunk) {
    const Chunk now(&w, chosen, i, end), after = behind(w, chosen, i, end, next);
    float scales[kChunk];
    for (int64_t r = 0; r < now.tiled(); r++) scales[r] = *now.row[r].scale;
    Lines ahead(after, 0, after.count == 0 ? 0 : after.w->width);
    const int64_t lines = lines_in(kDotRows * kBytesWide, (tokens + kDotTokens - 1) / kDotTokens);
    in_tiles(tokens, kDotTokens, [&](int64_t t, int64_t some) {
      int64_t token[kDotTokens];
      for (int64_t j = 0; j < some; j++) token[j] = numbers == nullptr ? t + j : numbers[t + j];
      for (int64_t r = 0; r < now.count; r += kDotRows) {
        four made[kDotTokens] = {};
        for (int64_t group = 0; group < groups; group++) {
          const int64_t first = group * kByteGroup;
          const char* rows[kDotRows];
          const int8_t* from[kDotTokens];
          for (int64_t q = 0; q < kDotRows; q++) rows[q] = now.row[r + q].data + first;
          for (int64_t j = 0; j < some; j++) from[j] = x.bytes + token[j] * stride + first;
          int32_t exact[kDotTokens][kDotRows];
          tiles[some - 1](rows, from, std::min(kByteGroup, w.width - first), exact, ahead, lines);
          for (int64_t j = 0; j < some; j++) {
            const int64_t at = token[j] * groups + group;
            made[j] += __builtin_convertvector(load<four_integers>(exact[j]) - x.sums[at], four) * x.scale[at];
          }
        }
        for (int64_t j = 0; j < some; j++)
          put_down(made[j] * load<four>(scales + r), true, now.count - r, out + (t + j) * out_stride + i - begin + r);
      }
    });
  }
}

void prepare_blocks(const Weights& w, const Takers& takers, const float* h, int64_t h_stride, int64_t first, int64_t last,
                    BlockBytes* bytes) {
  const int64_t chunks = (takers.size + kChunk - 1) / kChunk;
  int64_t b = std::upper_bound(takers.starts, takers.starts + takers.count, first) - takers.starts - 1;
  for (int64_t at = first; at < last; at++) {
    while (at >= takers.starts[b + 1]) b++;
    const float* from = h + takers.tokens[at] * h_stride + takers.places[at] * takers.size;
    const float* scale = w.scale + takers.blocks[b] * takers.size;
    for (int64_t i = 0; i < takers.size; i += kChunk) {
      BlockBytes& made = bytes[at * chunks + i / kChunk];
      made.scale = round_bytes(from + i, scale + i, std::min(kChunk, takers.size - i), kChunk, made.values, &made.sum);
    }
  }
}

void sum_by_bytes(const Weights& w, const Takers& takers, const BlockBytes* bytes, int64_t tokens, int64_t first, int64_t last,
                  float* y) {
  static constexpr auto tiles = sum_bytes_tiles(std::make_integer_sequence<int, kSumTokens>());
  const int64_t chunks = (takers.size + kChunk - 1) / kChunk;
  std::vector<float> rests(tokens * kBytesWide, 0.0f);  // the last columns, where they fill no panel
  const int64_t strip = sum_strip(tokens);
  static_assert(kSumUnit % kBytesWide == 0, "panels begin at the same columns in each strip");
  for (int64_t column = first; column < last; column += strip) {
    const int64_t end = std::min(column + strip, last), panels = (end - column + kBytesWide - 1) / kBytesWide;
    for (int64_t t = 0; t < tokens; t++) std::fill(y + t * w.width + column, y + t * w.width + end, 0.0f);
    each_chunk(w, takers, [&](int64_t b, int64_t i, const Chunk& now, const Chunk& next) {
      const int64_t quads = (now.count + 3) / 4;
      const int64_t begin = takers.starts[b], passes = (takers.starts[b + 1] - begin + kSumTokens - 1) / kSumTokens;
      Lines ahead(next, column, end - column);
      const int64_t by_quad = std::max<int64_t>(1, kStepLines / (passes + 1)), by_tile = (kStepLines - by_quad) * quads / passes;
      const char* rows[kChunk];
      for (int64_t r = 0; r < 4 * quads; r++) rows[r] = now.row[std::min(r, now.count - 1)].data + column;  // of none, h is 0
      for (int64_t p = 0; p < panels; p += kPanels) {
        const int64_t some_panels = std::min(kPanels, panels - p);
        vi made[kPanels][kChunk];
        for (int64_t q = 0; q < quads; q++) {
          ahead.ask(some_panels * by_quad);
          for (int64_t c = 0; c < some_panels; c++) {
            const int64_t at = (p + c) * kBytesWide, size = end - column - at;
            if (size >= kBytesWide) interleave(rows + 4 * q, at, made[c] + 4 * q);
            else interleave_some(rows + 4 * q, at, size, made[c] + 4 * q);
          }
        }
        for (int64_t c = 0; c < some_panels; c++) {
          const int64_t at = column + (p + c) * kBytesWide;
          in_tiles(takers.starts[b + 1] - begin, kSumTokens, [&](int64_t t, int64_t some) {
            float* to[kSumTokens];
            for (int64_t j = 0; j < some; j++) {
              const int64_t token = takers.tokens[begin + t + j];
              to[j] = at + kBytesWide <= end ? y + token * w.width + at : rests.data() + token * kBytesWide;
            }
            ahead.ask(by_tile);
            tiles[some - 1](made[c], quads, bytes + (begin + t) * chunks + i / kChunk, chunks, to);
          });
        }
      }
    });
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t at = column; at < end; at += kBytesWide) {
        const int64_t size = std::min(kBytesWide, end - at);
        float* to = y + t * w.width + at;
        in_order(size == kBytesWide ? to : rests.data() + t * kBytesWide, size, to);
      }
  }
}

}  // namespace

const ByteKernels TRIMTAB_BYTES = {prepare_bytes, prepare_blocks, dot_by_bytes, sum_by_bytes};

}  // namespace trimtab
