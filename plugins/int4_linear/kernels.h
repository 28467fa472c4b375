// The inner loops of Int4Linear, compiled once per instruction set and chosen when the library is loaded.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trimtab {

constexpr int64_t kInt4LinearBlock = 32;  // inputs that share a scale

// W, constant, packed into panels of neighbouring outputs. A panel has the scales of its blocks, [blocks, outputs of the panel],
// filled up to whole lines of the cache, and behind them the integers, [blocks, 4, outputs of the panel, 4]: byte (b, v, j, i)
// has the inputs 4 v + i of block b in its low half and 16 + 4 v + i in its high half. Outputs that fill up a panel are 0.
struct PackedInt4 {
  int64_t in_features = 0, out_features = 0;
  bool half = false;  // scales are bfloat16, else float
  const char* panels = nullptr;
  int64_t panel_bytes = 0, scale_bytes = 0;  // of a panel, of its scales

  int64_t blocks() const { return in_features / kInt4LinearBlock; }
};

struct Int4Source {
  const uint8_t* weight;  // [out_features, in_features / 2]
  const void* scale;      // [out_features, blocks], bfloat16 or float
};

struct Int4Product {
  const PackedInt4* weight;
  const char* rows;  // of x, as `quantize` writes them
  int64_t row_bytes;
  const float* bias;  // [out_features]
  float* y;           // [rows, out_features]
};

struct Int4Kernels {
  const char* name;
  int64_t panel;  // outputs

  // Bytes from row to row of what `quantize` writes.
  int64_t (*row_bytes)(int64_t in_features);

  // Sets the sizes of a panel of `w`, whose features and type of scales are set.
  void (*measure)(PackedInt4* w);

  void (*pack)(const Int4Source& source, const PackedInt4& w, char* panels);

  // Rounds a row of x.
  void (*quantize)(const float* x, int64_t in_features, char* row);

  // Rows [first_row, last_row) of y, those outputs that are in panels [first_panel, last_panel).
  void (*multiply)(const Int4Product& product, int64_t first_row, int64_t last_row, int64_t first_panel, int64_t last_panel);
};

extern const Int4Kernels kInt4Portable;
#if defined(TRIMTAB_X86)
extern const Int4Kernels kInt4Avx2, kInt4Avx512, kInt4Avx512Vnni;
#if defined(TRIMTAB_AVX_VNNI)
extern const Int4Kernels kInt4AvxVnni;
#endif
#endif

// Those of the best instruction set, see ../native/isa.h.
const Int4Kernels& int4_kernels();

}  // namespace trimtab
