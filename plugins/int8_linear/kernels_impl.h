// The kernels, in vectors of TRIMTAB_WIDTH floats; TRIMTAB_VNNI: bytes are multiplied directly. Included by one source file
// per instruction set.
#include "../native/activate.h"
#include "tile.h"

namespace trimtab {
namespace {

void pack(const int8_t* w, int64_t in_features, int64_t out_features, int8_t* panels, int32_t* sums) {
  const int64_t quads = (in_features + 3) / 4;
  for (int64_t first = 0; first < out_features; first += V, panels += quads * 4 * V, sums += V) {
    const int64_t count = std::min<int64_t>(V, out_features - first);
    std::fill_n(sums, V, 0);
    std::fill_n(panels, quads * 4 * V, int8_t{0});
    for (int64_t i = 0; i < in_features; i++)
      for (int64_t j = 0; j < count; j++) {
        const int8_t value = w[i * out_features + first + j];
        panels[i / 4 * 4 * V + 4 * j + i % 4] = value;
        sums[j] += value;
      }
  }
}

// Rows of sums [count, stride] → y. Whatever else is in the batch, a row goes through the same instructions.
template <Activation kind>
void finish_rows(const Int8Product& product, const int32_t* sums, int64_t stride, int64_t row, int64_t count, int64_t first,
                 int64_t outputs) {
  float* y = product.y + row * product.weight->out_features + first;
  for (int64_t j = 0; j < outputs; j += V) {
    const int64_t left = outputs - j;
    const float *scales = product.weight_scale + first + j, *biases = product.bias + first + j;
    const vf scale = left >= V ? load<vf>(scales) : load_part(scales, left);
    const vf bias = left >= V ? load<vf>(biases) : load_part(biases, left);
    const vi of_zero = load<vi>(product.weight->sums + first + j);
    for (int64_t m = 0; m < count; m++) {
      const RowScale& x = product.rows[row + m];
      const vi exact = load<vi>(sums + m * stride + j) - of_zero * x.zero;
      const vf v = activate<kind>(__builtin_convertvector(exact, vf) * (scale * x.scale) + bias);
      float* to = y + m * product.weight->out_features + j;
      if (left >= V) store(to, v);
      else
        for (int64_t i = 0; i < left; i++) to[i] = v[i];
    }
  }
  for (int64_t m = 0; m < count; m++)  // an activation may have made a number of NaN
    if (std::isnan(product.rows[row + m].scale))
      std::fill_n(y + m * product.weight->out_features, outputs, product.rows[row + m].scale);
}

using FinishRows = void (*)(const Int8Product&, const int32_t*, int64_t, int64_t, int64_t, int64_t, int64_t);

FinishRows finish_of(Activation kind) {
  switch (kind) {
#define TRIMTAB_KIND(name) \
  case Activation::name: return finish_rows<Activation::name>;
    TRIMTAB_KIND(relu) TRIMTAB_KIND(relu_squared) TRIMTAB_KIND(silu) TRIMTAB_KIND(gelu) TRIMTAB_KIND(gelu_tanh)
    TRIMTAB_KIND(quick_gelu) TRIMTAB_KIND(sigmoid) TRIMTAB_KIND(tanh)
#undef TRIMTAB_KIND
    default: return finish_rows<Activation::identity>;
  }
}

constexpr int64_t kLine = 16;  // floats in a line of the cache

void multiply(const Int8Product& product, int64_t first_row, int64_t last_row, int64_t first_panel, int64_t last_panel) {
  const PackedWeight& w = *product.weight;
  const int64_t quads = w.quads(), panel_bytes = quads * 4 * V;
  const FinishRows finish = finish_of(product.activation);
  alignas(64) int32_t sums[kTileRows * kTilePanels * V];
  const int64_t tiles = (last_row - first_row + kTileRows - 1) / kTileRows;
  const int64_t wide = last_row - first_row <= kFewRows ? kFewPanels : kTilePanels;
  for (int64_t p = first_panel; p < last_panel; p += wide) {
    const int64_t count = std::min(wide, last_panel - p);
    const int64_t first = p * V, outputs = std::min(count * V, w.out_features - first);
    const float* y = product.y + first;
    for (int64_t t = 0, row = first_row; t < tiles; t++) {
      const int64_t rows = (last_row - row + tiles - t - 1) / (tiles - t);  // tiles of about the same height
      // What is written comes into the cache while the tile is computed: rows are far apart, which no hardware foresees.
      for (int64_t m = 0; m < rows; m++)
        for (int64_t j = 0; j < outputs; j += kLine) __builtin_prefetch(y + (row + m) * w.out_features + j, 1);
      tile_of(rows, count)(product.integers + row * product.row_bytes, product.row_bytes, w.panels + p * panel_bytes, panel_bytes, quads, sums);
      finish(product, sums, count * V, row, rows, first, outputs);
      row += rows;
    }
  }
}

}  // namespace

const Int8Kernels TRIMTAB_KERNELS = {TRIMTAB_ISA, V, kTileRows, row_bytes, pack, quantize, multiply};

}  // namespace trimtab
