// int4 weights of packed blocks, in vectors of TRIMTAB_WIDTH floats; TRIMTAB_VNNI: bytes are multiplied directly.
#pragma once

#include <array>
#include <utility>

#include "packed_dot.h"
#include "tile_int4.h"

namespace trimtab {
namespace {

using DotInt4 = void (*)(const char*, const char*, int64_t, const char* const*, float* const*, Stream&, int64_t);

template <bool kHalf, bool kShort, int... T>
constexpr std::array<DotInt4, sizeof...(T)> dot_int4_tiles(std::integer_sequence<int, T...>) {
  return {dot_int4<T + 1, kHalf, kShort>...};
}

struct PackedInt4Rows {
  static constexpr int kTileRows = V == 16 ? 6 : 4;

  static int64_t scale_size(const Weights& w) { return w.short_scales ? 2 : 4; }
  static int64_t scale_bytes(const Weights& w, int64_t block) { return whole_lines(block * w.width / kInt4Block * scale_size(w)); }
  static int64_t block_bytes(const Weights& w, int64_t block) { return scale_bytes(w, block) + block * w.width / 2; }

  // The scale of row `row` and 32 columns, number `at`.
  static void put_scale(const Weights& w, int64_t row, int64_t at, char* to) {
    const char* from = reinterpret_cast<const char*>(w.scale + row * (w.width / kInt4Block) + at);
    const auto bits = load<uint32_t>(from);
    const auto high = static_cast<uint16_t>(bits >> 16);
    if (w.short_scales) std::memcpy(to, &high, sizeof high);
    else std::memcpy(to, &bits, sizeof bits);
  }

  // Weight `column` of a row.
  static int weight(const Weights& w, int64_t row, int64_t column) {
    return static_cast<const uint8_t*>(w.data)[(row * w.width + column) / 2] >> (column % 2 * 4) & 15;
  }

  // Calls use(first row, scales, integers) for each block.
  template <typename Use>
  static void each_block(const Weights& w, int64_t block, char* to, const Use& use) {
    for (int64_t first = 0; first < w.rows; first += block, to += block_bytes(w, block)) {
      std::memset(to, 0, scale_bytes(w, block));
      use(first, to, to + scale_bytes(w, block));
    }
  }

  // Of each panel of a block the scales, [width / 32, panel], and of all panels the integers as `dot_int4` wants them.
  static void pack_up(const Weights& w, int64_t block, char* to) {
    const int64_t panel = panel_of(block), columns = panel < V ? 8 : 4, size = scale_size(w);
    each_block(w, block, to, [&](int64_t first, char* scales, char* integers) {
      for (int64_t p = first; p < first + block; p += panel)
        for (int64_t at = 0; at < w.width; at += kInt4Block) {
          for (int64_t r = 0; r < panel; r++, scales += size) put_scale(w, p + r, at / kInt4Block, scales);
          for (int64_t c = 0; c < 16; c += columns)
            for (int64_t r = 0; r < panel; r++)
              for (int64_t i = 0; i < columns; i++)
                *integers++ = static_cast<char>(weight(w, p + r, at + c + i) | weight(w, p + r, at + 16 + c + i) << 4);
        }
    });
  }

  // Of each kChunk rows of a block the scales, [rows, width / 32], and of all of these the integers as `sum_int4` wants them.
  static void pack_down(const Weights& w, int64_t block, char* to) {
    each_block(w, block, to, [&](int64_t first, char* scales, char* integers) {
      for (int64_t r = first; r < first + block; r++)
        for (int64_t at = 0; at < w.width / kInt4Block; at++, scales += scale_size(w)) put_scale(w, r, at, scales);
      for (int64_t i = first, rows; i < first + block; i += rows) {
        rows = std::min(kChunk, first + block - i);
        for (int64_t at = 0; at < w.width; at += kInt4Block)
          for (int64_t q = i; q < i + rows; q += 4)
            for (int64_t c = at; c < at + 16; c++)
              for (int64_t r = q; r < q + 4; r++) *integers++ = static_cast<char>(weight(w, r, c) | weight(w, r, c + 16) << 4);
      }
    });
  }

  static int64_t row_bytes(int64_t width, int64_t) {
    return whole_lines(2 * width + width / kInt4Block * static_cast<int64_t>(sizeof(Int4Scale)));
  }

  static void prepare(const float* x, int64_t width, int64_t, char* row) {
    auto* to = reinterpret_cast<int8_t*>(row);
    for (int64_t at = 0; at < width; at += kInt4Block) {
      const Int4Scale scale = round_block(x + at, to + at, to + width + at);
      std::memcpy(row + 2 * width + at / kInt4Block * sizeof scale, &scale, sizeof scale);
    }
  }

  static void dot(const Weights& w, const Chosen& chosen, int64_t begin, int64_t, const Activations& x, int64_t tokens, float* out,
                  int64_t out_stride, const Wanted& next, const int32_t* numbers) {
    static constexpr auto kTiles = std::make_integer_sequence<int, kTileRows>();
    static constexpr std::array<DotInt4, kTileRows> tiles[] = {dot_int4_tiles<false, false>(kTiles), dot_int4_tiles<false, true>(kTiles),
                                                               dot_int4_tiles<true, false>(kTiles), dot_int4_tiles<true, true>(kTiles)};
    const int64_t panel = panel_of(chosen.size);
    const auto& kind = tiles[2 * (panel < V) + w.short_scales];
    const char* const scales = w.block(chosen.block(begin));
    const char* const integers = scales + scale_bytes(w, chosen.size);
    const int64_t step = panel * (kInt4Block / 2 + scale_size(w));
    each_tile(w, chosen, begin, tokens, kTileRows, panel, step, next, [&](int64_t t, int64_t some, int64_t r, Stream& ahead, int64_t lines) {
      const char* from[kTileRows];
      float* to[kTileRows];
      for (int64_t j = 0; j < some; j++) {
        from[j] = x.bytes + (numbers == nullptr ? t + j : numbers[t + j]) * x.row_bytes;
        to[j] = out + (t + j) * out_stride + r;
      }
      kind[some - 1](scales + r * w.width / kInt4Block * scale_size(w), integers + r * w.width / 2, w.width, from, to, ahead, lines);
    });
  }

  static void sum_by_block(const Weights& w, const Takers& takers, const float* h, int64_t h_stride, const BlockBytes*, int64_t,
                           int64_t tokens, int64_t first, int64_t last, float* y) {
    const auto& sum = w.short_scales ? sum_as<true> : sum_as<false>;
    const int64_t strip = sum_strip(tokens);
    for (int64_t column = first; column < last; column += strip)
      sum(w, takers, h, h_stride, tokens, column, std::min(column + strip, last), y);
  }

 private:
  static constexpr int64_t panel_of(int64_t size) { return size % V == 0 ? V : V / 2; }
  static_assert(kPackedBlock % (V / 2) == 0 && kStrip % kInt4Block == 0);

  // 32 values of x as two bytes each.
  static Int4Scale round_block(const float* x, int8_t* high, int8_t* low) {
    vf most = {}, spoilt = {};  // x * 0 is NaN where x is not finite
    for (int i = 0; i < kInt4Block; i += V) most = larger(most, magnitude(load<vf>(x + i))), spoilt += load<vf>(x + i) * 0.0f;
    const float largest = across(most, [](vf a, vf b) { return larger(a, b); })[0];
    const float nothing = across(spoilt, [](vf a, vf b) { return a + b; })[0];
    const float inverse = largest < 0x1p-100f ? 0.0f : kInt4Largest / largest;
    vi sum = {};
    for (int i = 0; i < kInt4Block; i += V) {
      const vi v = round_to_integers(load<vf>(x + i) * inverse);
      const vb highs = __builtin_convertvector((v + 128) >> 8, vb), lows = __builtin_convertvector(v, vb);
      std::memcpy(high + i, &highs, sizeof highs), std::memcpy(low + i, &lows, sizeof lows);
      sum += v;
    }
    return {largest / kInt4Largest + nothing, nothing == 0 ? -8 * sum_of(sum) : 0};
  }

  template <bool kShort>
  static void sum_as(const Weights& w, const Takers& takers, const float* h, int64_t h_stride, int64_t tokens, int64_t first,
                     int64_t last, float* y) {
    constexpr int64_t kSize = kShort ? 2 : 4;
    const int64_t size = takers.size, stride = w.width / kInt4Block * kSize, chunk_rows = std::min(kChunk, size);
    const auto h_of = [&](int64_t pair) { return h + takers.tokens[pair] * h_stride + takers.places[pair] * size; };
    for (int64_t t = 0; t < tokens; t++) std::fill(y + t * w.width + first, y + t * w.width + last, 0.0f);
    BlockStream ahead(w.packed, w.packed_block, takers.blocks, last - first == w.width ? takers.count : 0);
    const int64_t lines = lines_in(chunk_rows * (kInt4Block / 2 + kSize), 1);

    // What tokens of pairs begin to end add, whose h of the chunk's rows are from(pair).
    const auto add = [&](const Int4Chunk& chunk, int64_t begin, int64_t end, const auto& from) {
      const int64_t asked = chunk.rows / chunk_rows * lines;
      for (int64_t block = first / kInt4Block, end_block = last / kInt4Block; block < end_block; block += V)
        for (int64_t pair = begin; pair < end; pair++) {
          Int4Factors by;
          by.round<kShort>(chunk, block, from(pair));
          float* to = y + takers.tokens[pair] * w.width + block * kInt4Block;
          for (int64_t j = 0; j < std::min<int64_t>(V, end_block - block); j++) {
            if (pair == begin) ahead.ask(asked);
            sum_int4(chunk, block + j, by, j, to + j * kInt4Block);
          }
        }
    };
    const auto part = [&](Int4Chunk* chunk, int64_t b, int64_t i) {
      const char* block = w.block(takers.blocks[b]);
      chunk->add(std::min(kChunk, size - i), block + i * stride, stride, block + scale_bytes(w, size) + i * w.width / 2);
    };
    for (int64_t b = 0, count; b < takers.count; b += count) {
      // Of one token, small blocks are summed together.
      const int64_t most = tokens == 1 ? std::min(kChunk / chunk_rows, takers.count - b) : 1;
      for (count = 1; count < most && takers.starts[b + count + 1] - takers.starts[b + count] == 1;) count++;
      if (takers.starts[b + 1] - takers.starts[b] != 1) count = 1;
      if (count > 1) {
        Int4Chunk chunk(size * kInt4Block / 2);
        float mine[kChunk];
        for (int64_t i = 0; i < count; i++) {
          std::copy_n(h_of(takers.starts[b + i]), size, mine + i * size);
          part(&chunk, b + i, 0);
        }
        add(chunk, takers.starts[b], takers.starts[b] + 1, [&](int64_t) { return mine; });
        continue;
      }
      for (int64_t i = 0; i < size; i += kChunk) {
        Int4Chunk chunk(std::min(kChunk, size - i) * kInt4Block / 2);
        part(&chunk, b, i);
        add(chunk, takers.starts[b], takers.starts[b + 1], [&](int64_t pair) { return h_of(pair) + i; });
      }
    }
  }
};

}  // namespace
}  // namespace trimtab
