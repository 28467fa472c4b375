// The kernels, in vectors of TRIMTAB_WIDTH floats; TRIMTAB_VNNI: bytes are multiplied directly. Included by one source file
// per instruction set.
#include "tile.h"

namespace trimtab {
namespace {

constexpr int64_t kLine = 64;

void measure(PackedInt4* w) {
  w->scale_bytes = (w->blocks() * V * (w->half ? 2 : 4) + kLine - 1) / kLine * kLine;
  w->panel_bytes = w->scale_bytes + w->blocks() * kLoads * 4 * V;
}

// Weight `i` of 32 in 16 bytes, the first in the low half.
inline int nibble(const uint8_t* block, int64_t i) { return block[i / 2] >> (i % 2 * 4) & 15; }

void pack(const Int4Source& source, const PackedInt4& w, char* to) {
  const int64_t blocks = w.blocks(), size = w.half ? 2 : 4;
  for (int64_t first = 0; first < w.out_features; first += V, to += w.panel_bytes) {
    const int64_t count = std::min<int64_t>(V, w.out_features - first);
    std::memset(to, 0, w.scale_bytes);
    for (int64_t b = 0; b < blocks; b++) {
      char* integers = to + w.scale_bytes + b * kLoads * 4 * V;
      std::memset(integers, kZero << 4 | kZero, kLoads * 4 * V);
      for (int64_t j = 0; j < count; j++) {
        const int64_t at = (first + j) * blocks + b;
        std::memcpy(to + (b * V + j) * size, static_cast<const char*>(source.scale) + at * size, size);
        const uint8_t* block = source.weight + at * (kBlock / 2);
        for (int64_t i = 0; i < kBlock / 2; i++)
          integers[(i / 4 * V + j) * 4 + i % 4] = static_cast<char>(nibble(block, i) | nibble(block, kBlock / 2 + i) << 4);
      }
    }
  }
}

void multiply(const Int4Product& product, int64_t first_row, int64_t last_row, int64_t first_panel, int64_t last_panel) {
  const PackedInt4& w = *product.weight;
  const MultiplyTile* const of_rows = tiles_of(w.half);
  const int64_t tiles = (last_row - first_row + kTileRows - 1) / kTileRows;
  for (int64_t p = first_panel; p < last_panel; p++) {
    const int64_t first = p * V, outputs = std::min<int64_t>(V, w.out_features - first);
    for (int64_t t = 0, row = first_row; t < tiles; t++) {
      const int64_t rows = (last_row - row + tiles - t - 1) / (tiles - t);  // tiles of about the same height
      of_rows[rows - 1](product, row, w.panels + p * w.panel_bytes, first, outputs);
      row += rows;
    }
  }
}

}  // namespace

const Int4Kernels TRIMTAB_KERNELS = {TRIMTAB_ISA, V, row_bytes, measure, pack, quantize, multiply};

}  // namespace trimtab
