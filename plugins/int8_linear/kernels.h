// The inner loops of Int8Linear, compiled once per instruction set and chosen when the library is loaded.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../native/activation.h"

namespace trimtab {

// W [in_features, out_features], int8, constant: packed into panels of neighbouring outputs, in each of which four inputs of
// one output lie side by side, [panels, ceil(in_features / 4), outputs of a panel, 4]. Zeros fill up both sides.
struct PackedWeight {
  int64_t in_features = 0, out_features = 0;
  const int8_t* panels = nullptr;
  const int32_t* sums = nullptr;  // of an output's weights, [out_features], zeros up to a whole panel

  int64_t quads() const { return (in_features + 3) / 4; }
};

// What a row's integers stand for: x = (q - zero) * scale. NaN as scale: the row has values that are not finite.
struct RowScale {
  float scale;
  int32_t zero;
};

struct Int8Product {
  const PackedWeight* weight;
  const char* integers;  // of x, as `quantize` writes them
  int64_t row_bytes;     // from row to row
  const RowScale* rows;
  const float* weight_scale;  // [out_features]
  const float* bias;          // [out_features]
  Activation activation;
  float* y;  // [rows, out_features]
};

struct Int8Kernels {
  const char* name;
  int64_t panel;  // outputs
  int64_t tile;   // rows that are multiplied at once

  // Bytes from row to row of integers.
  int64_t (*row_bytes)(int64_t in_features);

  // Panels and sums of `w`, into memory that is large enough: multiples of `panel` outputs.
  void (*pack)(const int8_t* w, int64_t in_features, int64_t out_features, int8_t* panels, int32_t* sums);

  // Rounds a row of x to integers in [0, 255].
  RowScale (*quantize)(const float* x, int64_t in_features, char* integers);

  // Rows [first_row, last_row) of y, those outputs that are in panels [first_panel, last_panel).
  void (*multiply)(const Int8Product& product, int64_t first_row, int64_t last_row, int64_t first_panel, int64_t last_panel);
};

extern const Int8Kernels kInt8Portable;
#if defined(TRIMTAB_X86)
extern const Int8Kernels kInt8Avx2, kInt8Avx512, kInt8Avx512Vnni;
#if defined(TRIMTAB_AVX_VNNI)
extern const Int8Kernels kInt8AvxVnni;
#endif
#endif

// Those of the best instruction set, see ../native/isa.h.
const Int8Kernels& int8_kernels();

}  // namespace trimtab
