// int8 weights of packed blocks, in vectors of TRIMTAB_WIDTH floats; TRIMTAB_VNNI: bytes are multiplied directly.
#pragma once

#include <array>
#include <utility>

#include "packed_dot.h"
#include "tile_int8.h"

namespace trimtab {
namespace {

using DotBytes = void (*)(const char*, int64_t, const int8_t* const*, int32_t*, Stream&, int64_t);
using SumBytes = void (*)(const char*, int64_t, const BlockBytes*, int64_t, float* const*, Stream&, int64_t);

template <int N, bool kHalf, int... T>
constexpr std::array<DotBytes, sizeof...(T)> dot_bytes_tiles(std::integer_sequence<int, T...>) {
  return {dot_bytes<T + 1, N, kHalf>...};
}
template <int N, int kLimbs, int... T>
constexpr std::array<SumBytes, sizeof...(T)> sum_bytes_tiles(std::integer_sequence<int, T...>) {
  return {sum_bytes<(T + 1) * kLimbs, N, kLimbs>...};
}
constexpr auto kTiles = std::make_integer_sequence<int, kTileRows>();
constexpr auto kPairs = std::make_integer_sequence<int, kTileRows / 2>();

struct PackedInt8 {
  static constexpr int64_t kGroup = 1024;  // of x that share a scale

  static int64_t groups(int64_t width) { return (width + kGroup - 1) / kGroup; }

  static int64_t scale_bytes(int64_t block) { return whole_lines(block * sizeof(float)); }
  static int64_t block_bytes(const Weights& w, int64_t block) { return scale_bytes(block) + block * w.width; }
  static const float* scales(const Weights& w, int64_t block) { return reinterpret_cast<const float*>(w.block(block)); }

  // Calls use(number, to) for each block, with its scales in front of `to`.
  template <typename Use>
  static void each_block(const Weights& w, int64_t block, char* to, const Use& use) {
    for (int64_t number = 0; number < w.rows / block; number++, to += block_bytes(w, block)) {
      std::memcpy(to, w.scale + number * block, block * sizeof(float));
      use(static_cast<const int8_t*>(w.data) + number * block * w.width, to + scale_bytes(block));
    }
  }

  // Each panel of a block: at each step of some columns, those of its first row, those of the second, ...
  static void pack_up(const Weights& w, int64_t block, char* to) {
    const int64_t panel = panel_of(block), columns = panel < V ? 8 : 4;
    each_block(w, block, to, [&](const int8_t* from, char* mine) {
      for (int64_t first = 0; first < block; first += panel, mine += panel * w.width)
        for (int64_t r = 0; r < panel; r++, from += w.width)
          for (int64_t i = 0; i < w.width; i += 4) {
            const uint32_t four = load<uint32_t>(from + i) ^ 0x80808080u;
            std::memcpy(mine + i / columns * columns * panel + r * columns + i % columns, &four, sizeof four);
          }
    });
  }

  // Of each kChunk rows of a block, each panel: of the first four rows its first column, its second, ...
  static void pack_down(const Weights& w, int64_t block, char* to) {
    const int64_t panel = panel_of(w.width);
    each_block(w, block, to, [&](const int8_t* from, char* mine) {
      for (int64_t i = 0, size; i < block; i += size, mine += size * w.width) {
        size = std::min(kChunk, block - i);
        for (int64_t r = 0; r < size; r++, from += w.width) {
          char* place = mine + r / 4 * 4 * panel + r % 4;
          for (int64_t c = 0; c < w.width; c += panel, place += size * panel)
            for (int64_t j = 0; j < panel; j++) place[4 * j] = static_cast<char>(from[c + j] ^ 0x80);
        }
      }
    });
  }

  // A row of x: its bytes, [limbs, stride], zeros at the end; of their groups, [limbs, groups], the scales and 128 times the sums.
  struct X {
    int64_t stride, all;  // all: groups of all limbs

    X(int64_t width, int64_t limbs) : stride(whole_lines(width)), all(limbs * groups(width)) {}
    static const int8_t* bytes(const char* row) { return reinterpret_cast<const int8_t*>(row); }
    const float* scale(const char* row, int64_t limbs) const { return reinterpret_cast<const float*>(row + limbs * stride); }
    const int32_t* sums(const char* row, int64_t limbs) const { return reinterpret_cast<const int32_t*>(scale(row, limbs) + all); }
  };

  static int64_t row_bytes(int64_t width, int64_t limbs) {
    const X x(width, limbs);
    return whole_lines(limbs * x.stride + x.all * 8);
  }

  static void prepare(const float* from, int64_t width, int64_t limbs, char* row) {
    const X x(width, limbs);
    auto* bytes = const_cast<int8_t*>(X::bytes(row));
    auto* scale = const_cast<float*>(x.scale(row, limbs));
    auto* sums = const_cast<int32_t*>(x.sums(row, limbs));
    const int64_t count = groups(width);
    for (int64_t group = 0; group < count; group++) {
      const int64_t begin = group * kGroup, size = std::min(kGroup, width - begin);
      const float last = round_bytes(from + begin, nullptr, size, whole_lines(size), limbs, bytes + begin, x.stride, sums + group, count);
      scale[group] = limbs == 1 ? last : kBase * last;
      if (limbs == 2) scale[count + group] = last;
    }
  }

  static void dot(const Weights& w, const Chosen& chosen, int64_t begin, int64_t, const Activations& rows, int64_t tokens,
                  float* out, int64_t out_stride, const Wanted& next, const int32_t* numbers) {
    static constexpr std::array<DotBytes, kTileRows> tiles[] = {dot_bytes_tiles<1, true>(kTiles), dot_bytes_tiles<1, false>(kTiles),
                                                                dot_bytes_tiles<2, false>(kTiles)};
    const int64_t panel = panel_of(chosen.size), columns = panel < V ? 8 : 4, limbs = rows.limbs, count = groups(w.width);
    const auto& kind = tiles[panel / V];
    const X x(w.width, limbs);
    const float* const scales = PackedInt8::scales(w, chosen.block(begin));
    const char* const data = w.block(chosen.block(begin)) + scale_bytes(chosen.size);
    const auto tile = [&](int64_t t, int64_t some, int64_t r, Stream& ahead, int64_t lines) {
      float made[kTileRows][2 * V] = {};
      for (int64_t group = 0; group < count; group++) {
        const int64_t at = group * kGroup, size = std::min(kGroup, w.width - at);
        const int8_t* from[kTileRows];
        const char* of[kTileRows];  // rows of x
        for (int64_t j = 0; j < some * limbs; j++) {
          const int64_t token = t + j / limbs;
          of[j] = rows.bytes + (numbers == nullptr ? token : numbers[token]) * rows.row_bytes;
          from[j] = X::bytes(of[j]) + j % limbs * x.stride + at;
        }
        int32_t exact[kTileRows * 2 * V];
        kind[some * limbs - 1](data + r * w.width + at * panel, size / columns, from, exact, ahead, lines);
        for (int64_t j = 0; j < some * limbs; j++) {
          const int64_t place = j % limbs * count + group;
          const int32_t less = x.sums(of[j], limbs)[place];
          const float scale = x.scale(of[j], limbs)[place];
          for (int64_t i = 0; i < panel; i++) made[j / limbs][i] += static_cast<float>(exact[j * panel + i] - less) * scale;
        }
      }
      for (int64_t j = 0; j < some; j++)
        for (int64_t i = 0; i < panel; i++) out[(t + j) * out_stride + r + i] = made[j][i] * scales[r + i];
    };
    each_tile(w, chosen, begin, tokens, kTileRows / limbs, panel, panel * columns, next, tile);
  }

  static void prepare_blocks(const Weights& w, const Takers& takers, const float* h, int64_t h_stride, int64_t limbs, int64_t first,
                             int64_t last, BlockBytes* bytes) {
    if (first == last) return;
    const int64_t chunks = (takers.size + kChunk - 1) / kChunk;
    const auto block_of = [&](int64_t pair) {
      return std::upper_bound(takers.starts, takers.starts + takers.count, pair) - takers.starts - 1;
    };
    int64_t b = block_of(first);
    for (int64_t i = b; i < takers.count && takers.starts[i] < last; i++) __builtin_prefetch(w.block(takers.blocks[i]), 0, 3);
    for (int64_t at = first; at < last; at++) {
      while (at >= takers.starts[b + 1]) b++;
      const float* from = h + takers.tokens[at] * h_stride + takers.places[at] * takers.size;
      const float* scale = scales(w, takers.blocks[b]);
      for (int64_t i = 0; i < takers.size; i += kChunk) {
        BlockBytes *high = bytes + at * limbs * chunks + i / kChunk, *low = high + (limbs - 1) * chunks;
        constexpr int64_t kStride = sizeof(BlockBytes);
        const float last_scale = round_bytes(from + i, scale + i, std::min(kChunk, takers.size - i), kChunk, limbs, high->values,
                                             chunks * kStride, &high->sum, chunks * kStride / sizeof high->sum);
        high->scale = kBase * last_scale, low->scale = last_scale;
      }
    }
  }

  static void sum_by_block(const Weights& w, const Takers& takers, const float*, int64_t, const BlockBytes* bytes, int64_t limbs,
                           int64_t tokens, int64_t first, int64_t last, float* y) {
    static constexpr std::array<SumBytes, kTileRows> one[] = {sum_bytes_tiles<1, 1>(kTiles), sum_bytes_tiles<2, 1>(kTiles)};
    static constexpr std::array<SumBytes, kTileRows / 2> two[] = {sum_bytes_tiles<1, 2>(kPairs), sum_bytes_tiles<2, 2>(kPairs)};
    const int64_t chunks = (takers.size + kChunk - 1) / kChunk, most = kTileRows / limbs, strip = sum_strip(tokens);
    const int64_t panel = panel_of(w.width);
    const SumBytes* const kind = limbs == 1 ? one[panel / V - 1].data() : two[panel / V - 1].data();
    for (int64_t column = first; column < last; column += strip) {
      const int64_t end = std::min(column + strip, last);
      for (int64_t t = 0; t < tokens; t++) std::fill(y + t * w.width + column, y + t * w.width + end, 0.0f);
      // What of a chunk of `size` rows the strip has, and where.
      const auto part = [&](int64_t b, int64_t i, int64_t* size) {
        *size = std::min(kChunk, takers.size - i);
        return w.block(takers.blocks[b]) + scale_bytes(takers.size) + i * w.width + column * *size;
      };
      for (int64_t b = 0; b < takers.count; b++)
        for (int64_t i = 0; i < takers.size; i += kChunk) {
          int64_t size, next_size = 0;
          const char *data = part(b, i, &size), *next = nullptr;
          if (i + kChunk < takers.size) next = part(b, i + kChunk, &next_size);
          else if (b + 1 < takers.count) next = part(b + 1, 0, &next_size);
          const bool near = limbs == 2 && size * (end - column) > kShort;
          Stream ahead(kAhead, near, data, size * (end - column), next, next_size * (end - column));
          const int64_t begin = takers.starts[b], some_tokens = takers.starts[b + 1] - begin;
          const int64_t lines = lines_in(4 * panel, (some_tokens + most - 1) / most);
          for (int64_t c = column; c < end; c += panel)
            in_tiles(some_tokens, most, [&](int64_t t, int64_t some) {
              float* to[kTileRows];
              for (int64_t j = 0; j < some; j++) to[j] = y + takers.tokens[begin + t + j] * w.width + c;
              kind[some - 1](data + (c - column) * size, size / 4, bytes + (begin + t) * limbs * chunks + i / kChunk, chunks,
                                     to, ahead, lines);
            });
        }
    }
  }

 private:
  // Rows or columns of a panel: those of two vectors, one, or half of one, as they divide the block or the width.
  static constexpr int64_t panel_of(int64_t size) { return size % (2 * V) == 0 ? 2 * V : size % V == 0 ? V : V / 2; }
  static_assert(kPackedBlock % (V / 2) == 0 && kPackedWidth % V == 0 && kStrip % (2 * V) == 0);
};

}  // namespace
}  // namespace trimtab
