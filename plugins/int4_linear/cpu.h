// Int4Linear on the CPU: rows are rounded, multiplied block by block and scaled in one pass over the output.
#pragma once

#include <algorithm>

#include "../native/grid.h"
#include "../native/scratch.h"
#include "packed.h"

namespace trimtab {

struct Int4Linear {
  static constexpr const char* kName = "Int4Linear";
  // x, weight, weight_scale, bias
  static constexpr ort::Argument kInputs[] = {{}, {}, {}, {}};
  static constexpr ort::Argument kOutputs[] = {{ort::Type::float32}};

  const void *source = nullptr, *source_scale = nullptr;  // of the constants that are packed
  std::shared_ptr<const PackedBlocks> packed;

  const char* read(const ort::Runtime& runtime, const ort::KernelInfo* info) {
    const Tensor weight = tensor_of(runtime, runtime.constant_input(info, 1)), scale = tensor_of(runtime, runtime.constant_input(info, 2));
    if (!weight || !scale) return nullptr;
    if (const char* error = check(weight, scale)) return error;
    source = weight.data, source_scale = scale.data;
    packed = PackedBlocks::of(weight, scale);
    return nullptr;
  }

  const char* compute(const ort::Runtime& runtime, ort::KernelContext* context) const {
    const Tensor x = read_input(runtime, context, 0), weight = read_input(runtime, context, 1);
    const Tensor scale = read_input(runtime, context, 2), bias = read_input(runtime, context, 3);
    if (const char* error = check(weight, scale)) return error;
    const int64_t in_features = 2 * weight.dims[1], out_features = weight.dims[0];
    if (x.type != ort::Type::float32 || x.rank < 1 || x.rank > Tensor::kMostDims || x.last() != in_features)
      return "Int4Linear: x is not float32 [..., in_features]";
    if (bias.type != ort::Type::float32 || bias.rank != 1 || bias.dims[0] != out_features)
      return "Int4Linear: bias is not float32 [out_features]";
    int64_t shape[Tensor::kMostDims];
    std::copy_n(x.dims, x.rank, shape);
    shape[x.rank - 1] = out_features;
    auto* y = write_output<float>(runtime, context, 0, shape, x.rank);
    const int64_t rows = x.rows();
    if (rows == 0 || out_features == 0) return nullptr;

    const Int4Kernels& use = int4_kernels();
    std::shared_ptr<const PackedBlocks> own;
    if (packed == nullptr || weight.data != source || scale.data != source_scale)
      own = std::make_shared<const PackedBlocks>(weight, scale, use);
    const PackedInt4& w = (own ? own : packed)->view();
    if (w.panels == nullptr) return "Int4Linear: no memory for the packed weight";

    const int64_t row_bytes = use.row_bytes(in_features);
    char* const q = scratch(rows * row_bytes);
    each_row(runtime, context, rows, in_features, [&](int64_t row) {
      use.quantize(x.floats() + row * in_features, in_features, q + row * row_bytes);
    });

    const Int4Product product{&w, q, row_bytes, bias.floats(), y};
    const Grid grid(rows, in_features, out_features, use.panel);
    grid.each(runtime, context, [&](int64_t first_row, int64_t last_row, int64_t first_panel, int64_t last_panel) {
      use.multiply(product, first_row, last_row, first_panel, last_panel);
    });
    return nullptr;
  }

 private:
  static const char* check(const Tensor& weight, const Tensor& scale) {
    if (weight.type != ort::Type::uint8 || weight.rank != 2) return "Int4Linear: weight is not uint8 [out_features, in_features / 2]";
    if (weight.dims[1] == 0 || weight.dims[1] % (kInt4LinearBlock / 2) != 0) return "Int4Linear: in_features is not a multiple of 32";
    const bool known = scale.type == ort::Type::float32 || scale.type == ort::Type::bfloat16;
    if (!known || scale.rank != 2 || scale.dims[0] != weight.dims[0] || scale.dims[1] * (kInt4LinearBlock / 2) != weight.dims[1])
      return "Int4Linear: weight_scale is not float32 or bfloat16 [out_features, in_features / 32]";
    return nullptr;
  }
};

inline const Registered<Int4Linear> kInt4Linear;

}  // namespace trimtab
