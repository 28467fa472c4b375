// Products of M rows with one panel. Within a block they are sums of integers; these count as their scales say.
#pragma once

#include <array>
#include <utility>

#include "../native/int4_sums.h"
#include "quantize.h"

namespace trimtab {
namespace {

#define TRIMTAB_ALL _Pragma("GCC unroll 16")

#if TRIMTAB_WIDTH == 16
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kQuads = kBlock / 4, kLoads = kQuads / 2;  // of a block: fours of inputs, vectors of weights
constexpr int64_t kAhead = 4096;  // bytes that a row asks for before it reads them

// y[m][j] = sum over the inputs of x[m] times W's output j of the panel, plus bias, for j in [0, outputs).
template <int M, bool kHalf>
void multiply_tile(const Int4Product& product, int64_t row, const char* panel, int64_t first, int64_t outputs) {
  const PackedInt4& w = *product.weight;
  const int64_t blocks = w.blocks();
  const char* integers = panel + w.scale_bytes;
  const char* x = product.rows + row * product.row_bytes;
  const char* scales = x + w.in_features;
  const int64_t each = w.panel_bytes / blocks;
  vf sums[M] = {};
  for (int64_t b = 0; b < blocks; b++, integers += kLoads * 4 * V, x += kBlock, scales += sizeof(BlockScale)) {
    if (M == 1) {
      const char* ahead = panel + kAhead + b * each;
      for (int64_t i = 0; i < each; i += 64) __builtin_prefetch(ahead + i);
    }
    vi quads[kQuads];
    TRIMTAB_ALL for (int v = 0; v < kLoads; v++) {
      const vi both = load<vi>(integers + v * 4 * V);
      quads[v] = both & 0x0f0f0f0f;
      quads[kLoads + v] = (both >> 4) & 0x0f0f0f0f;
    }
    const vf scale = load_scales<kHalf>(panel + b * V * (kHalf ? 2 : 4));
    TRIMTAB_ALL for (int m = 0; m < M; m++) {
      const char* from = x + m * product.row_bytes;
      const auto of_block = load<BlockScale>(scales + m * product.row_bytes);
      Int4Sums exact(of_block.less);
      TRIMTAB_ALL for (int k = 0; k < kQuads; k++) exact.add(quads[k], vi{} + load<int32_t>(from + 4 * k));
      sums[m] += __builtin_convertvector(exact.total(), vf) * scale * of_block.scale;  // in this order 0 stays 0
    }
  }
  const float* biases = product.bias + first;
  const vf bias = outputs == V ? load<vf>(biases) : load_part(biases, outputs);
  TRIMTAB_ALL for (int m = 0; m < M; m++) {
    float* to = product.y + (row + m) * w.out_features + first;
    const vf v = sums[m] + bias;
    if (outputs == V) store(to, v);
    else
      for (int64_t i = 0; i < outputs; i++) to[i] = v[i];
  }
}

using MultiplyTile = void (*)(const Int4Product&, int64_t, const char*, int64_t, int64_t);

template <bool kHalf, int... M>
constexpr std::array<MultiplyTile, sizeof...(M)> tiles_of(std::integer_sequence<int, M...>) {
  return {multiply_tile<M + 1, kHalf>...};
}

// For 1 to kTileRows rows, one behind the other.
inline const MultiplyTile* tiles_of(bool half) {
  static constexpr auto of_floats = tiles_of<false>(std::make_integer_sequence<int, kTileRows>());
  static constexpr auto of_halves = tiles_of<true>(std::make_integer_sequence<int, kTileRows>());
  return half ? of_halves.data() : of_floats.data();
}

}  // namespace
}  // namespace trimtab
