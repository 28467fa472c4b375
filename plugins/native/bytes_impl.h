// The kernels that multiply bytes, in vectors of TRIMTAB_WIDTH floats; TRIMTAB_VNNI: directly. Included by one source file per
// instruction set that can.
#include <array>
#include <utility>

#include "tile_bytes.h"

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

// Rows or columns of a panel: those of two vectors, one, or half of one, as they divide the block or the width.
constexpr int64_t panel_of(int64_t size) { return size % (2 * V) == 0 ? 2 * V : size % V == 0 ? V : V / 2; }
static_assert(kBytesBlock % (V / 2) == 0 && kBytesWidth % V == 0 && kStrip % (2 * V) == 0);

// Each panel of a block: at each step of some columns, those of its first row, those of the second, ...
void pack_up(const int8_t* w, int64_t rows, int64_t width, int64_t block, char* to) {
  const int64_t panel = panel_of(block), columns = panel < V ? 8 : 4;
  for (int64_t first = 0; first < rows; first += panel, to += panel * width)
    for (int64_t r = 0; r < panel; r++) {
      const int8_t* from = w + (first + r) * width;
      for (int64_t i = 0; i < width; i += 4) {
        const uint32_t four = load<uint32_t>(from + i) ^ 0x80808080u;
        std::memcpy(to + i / columns * columns * panel + r * columns + i % columns, &four, sizeof four);
      }
    }
}

// Of each kChunk rows of a block, each panel: of the first four rows its first column, its second, ...
void pack_down(const int8_t* w, int64_t rows, int64_t width, int64_t block, char* to) {
  const int64_t panel = panel_of(width);
  for (int64_t first = 0; first < rows; first += block)
    for (int64_t i = 0, size; i < block; i += size, to += size * width) {
      size = std::min(kChunk, block - i);
      for (int64_t r = 0; r < size; r++) {
        const int8_t* from = w + (first + i + r) * width;
        char* mine = to + r / 4 * 4 * panel + r % 4;
        for (int64_t c = 0; c < width; c += panel, mine += size * panel)
          for (int64_t j = 0; j < panel; j++) mine[4 * j] = static_cast<char>(from[c + j] ^ 0x80);
      }
    }
}

void prepare_bytes(const float* x, int64_t width, int64_t limbs, int8_t* bytes, float* scale, int32_t* sums) {
  const int64_t groups = byte_groups(width);
  for (int64_t group = 0; group < groups; group++) {
    const int64_t begin = group * kByteGroup, size = std::min(kByteGroup, width - begin);
    const float last = round_bytes(x + begin, nullptr, size, byte_stride(size), limbs, bytes + begin, byte_stride(width),
                                   sums + group, groups);
    scale[group] = limbs == 1 ? last : kBase * last;
    if (limbs == 2) scale[groups + group] = last;
  }
}

void dot_by_bytes(const Weights& w, const Chosen& chosen, int64_t begin, int64_t end, const Activations& x, int64_t tokens,
                  float* out, int64_t out_stride, const Wanted& next, const int32_t* numbers) {
  static constexpr std::array<DotBytes, kTileRows> tiles[] = {dot_bytes_tiles<1, true>(kTiles), dot_bytes_tiles<1, false>(kTiles),
                                                              dot_bytes_tiles<2, false>(kTiles)};
  const int64_t first = chosen.row(begin), count = end - begin, panel = panel_of(chosen.size), columns = panel < V ? 8 : 4;
  const int64_t stride = byte_stride(w.width), groups = byte_groups(w.width), limbs = x.limbs, most = kTileRows / limbs;
  const auto& kind = tiles[panel / V];
  const char* const data = w.packed + first * w.width;
  const bool more = next.weights != nullptr;
  const int64_t passes = (tokens + most - 1) / most;
  const bool evenly = passes > 1 || count * w.width <= kShort;
  const int64_t lines = evenly ? lines_in(panel * columns, passes) : 0;
  Stream ahead(passes > 1 ? kPassesAhead : evenly ? kAhead : kBeginning, false, data, evenly ? count * w.width : 0,
               more ? next.weights->packed + next.chosen.row(next.begin) * w.width : nullptr, (next.end - next.begin) * w.width);
  for (int64_t r = 0; r < count; r += panel)
    in_tiles(tokens, most, [&](int64_t t, int64_t some) {
      float made[kTileRows][2 * V] = {};
      for (int64_t group = 0; group < groups; group++) {
        const int64_t at = group * kByteGroup, size = std::min(kByteGroup, w.width - at);
        const int8_t* from[kTileRows];
        int64_t scales[kTileRows];  // their places
        for (int64_t j = 0; j < some * limbs; j++) {
          const int64_t token = t + j / limbs, row = (numbers == nullptr ? token : numbers[token]) * limbs + j % limbs;
          from[j] = x.bytes + row * stride + at, scales[j] = row * groups + group;
        }
        if (!evenly && r + panel >= count && group == groups - 1) ahead.ask(lines_in(kBeginning, 1));
        int32_t exact[kTileRows * 2 * V];
        kind[some * limbs - 1](data + r * w.width + at * panel, size / columns, from, exact, ahead, lines);
        for (int64_t j = 0; j < some * limbs; j++) {
          const int32_t less = x.sums[scales[j]];
          const float scale = x.scale[scales[j]];
          for (int64_t i = 0; i < panel; i++) made[j / limbs][i] += static_cast<float>(exact[j * panel + i] - less) * scale;
        }
      }
      for (int64_t j = 0; j < some; j++)
        for (int64_t i = 0; i < panel; i++) out[(t + j) * out_stride + r + i] = made[j][i] * w.scale[first + r + i];
    });
}

void prepare_blocks(const Weights& w, const Takers& takers, const float* h, int64_t h_stride, int64_t limbs, int64_t first,
                    int64_t last, BlockBytes* bytes) {
  const int64_t chunks = (takers.size + kChunk - 1) / kChunk;
  int64_t b = std::upper_bound(takers.starts, takers.starts + takers.count, first) - takers.starts - 1;
  for (int64_t at = first; at < last; at++) {
    while (at >= takers.starts[b + 1]) b++;
    const float* from = h + takers.tokens[at] * h_stride + takers.places[at] * takers.size;
    const float* scale = w.scale + takers.blocks[b] * takers.size;
    for (int64_t i = 0; i < takers.size; i += kChunk) {
      BlockBytes *high = bytes + at * limbs * chunks + i / kChunk, *low = high + (limbs - 1) * chunks;
      constexpr int64_t kStride = sizeof(BlockBytes);
      const float last_scale = round_bytes(from + i, scale + i, std::min(kChunk, takers.size - i), kChunk, limbs, high->values,
                                           chunks * kStride, &high->sum, chunks * kStride / sizeof high->sum);
      high->scale = kBase * last_scale, low->scale = last_scale;
    }
  }
}

void sum_by_bytes(const Weights& w, const Takers& takers, const BlockBytes* bytes, int64_t limbs, int64_t tokens, int64_t first,
                  int64_t last, float* y) {
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
      return w.packed + (takers.blocks[b] * takers.size + i) * w.width + column * *size;
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

}  // namespace

const ByteKernels TRIMTAB_BYTES = {pack_up, pack_down, prepare_bytes, prepare_blocks, dot_by_bytes, sum_by_bytes};

}  // namespace trimtab
