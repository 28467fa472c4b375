// Int8Linear on the CPU: rows are rounded, multiplied, scaled and activated in one pass over the output.
#pragma once

#include <algorithm>

#include "../native/grid.h"
#include "../native/scratch.h"
#include "packed.h"

namespace trimtab {

struct Int8Linear {
  static constexpr const char* kName = "Int8Linear";
  // x, weight, weight_scale, bias
  static constexpr ort::Argument kInputs[] = {{}, {}, {}, {}};
  static constexpr ort::Argument kOutputs[] = {{ort::Type::float32}};

  Activation activation = Activation::identity;
  const void* source = nullptr;  // of the constant that is packed
  std::shared_ptr<const Packed> packed;

  const char* read(const ort::Runtime& runtime, const ort::KernelInfo* info) {
    int64_t number = 0;
    runtime.attribute(info, "activation", &number);
    if (number < 0 || number >= static_cast<int64_t>(Activation::unknown)) return "Int8Linear: unknown activation";
    activation = static_cast<Activation>(number);
    if (const Tensor weight = tensor_of(runtime, runtime.constant_input(info, 1))) {
      if (const char* error = check(weight)) return error;
      source = weight.data;
      packed = Packed::of(weight);
    }
    return nullptr;
  }

  const char* compute(const ort::Runtime& runtime, ort::KernelContext* context) const {
    const Tensor x = read_input(runtime, context, 0), weight = read_input(runtime, context, 1);
    const Tensor scale = read_input(runtime, context, 2), bias = read_input(runtime, context, 3);
    if (const char* error = check(weight)) return error;
    const int64_t in_features = weight.dims[0], out_features = weight.dims[1];
    if (x.type != ort::Type::float32 || x.rank < 1 || x.rank > Tensor::kMostDims || x.last() != in_features)
      return "Int8Linear: x is not float32 [..., in_features]";
    for (const Tensor* tensor : {&scale, &bias})
      if (tensor->type != ort::Type::float32 || tensor->rank != 1 || tensor->dims[0] != out_features)
        return "Int8Linear: weight_scale and bias are not float32 [out_features]";
    int64_t shape[Tensor::kMostDims];
    std::copy_n(x.dims, x.rank, shape);
    shape[x.rank - 1] = out_features;
    auto* y = write_output<float>(runtime, context, 0, shape, x.rank);
    const int64_t rows = x.rows();
    if (rows == 0 || out_features == 0) return nullptr;

    const Int8Kernels& use = int8_kernels();
    std::shared_ptr<const Packed> own;
    if (packed == nullptr || weight.data != source)
      own = std::make_shared<const Packed>(static_cast<const int8_t*>(weight.data), in_features, out_features, use);
    const PackedWeight& w = (own ? own : packed)->view();
    if (w.panels == nullptr) return "Int8Linear: no memory for the packed weight";

    const int64_t row_bytes = use.row_bytes(in_features);
    char* const q = scratch(rows * (row_bytes + static_cast<int64_t>(sizeof(RowScale))));
    auto* const row_scales = reinterpret_cast<RowScale*>(q + rows * row_bytes);
    each_row(runtime, context, rows, in_features, [&](int64_t row) {
      row_scales[row] = use.quantize(x.floats() + row * in_features, in_features, q + row * row_bytes);
    });

    const Int8Product product{&w, q, row_bytes, row_scales, scale.floats(), bias.floats(), activation, y};
    const Grid grid(rows, in_features, out_features, use.panel);
    grid.each(runtime, context, [&](int64_t first_row, int64_t last_row, int64_t first_panel, int64_t last_panel) {
      use.multiply(product, first_row, last_row, first_panel, last_panel);
    });
    return nullptr;
  }

 private:
  static const char* check(const Tensor& weight) {
    if (weight.type != ort::Type::int8 || weight.rank != 2) return "Int8Linear: weight is not int8 [in_features, out_features]";
    return weight.dims[0] > 1 << 16 ? "Int8Linear: sums of more than 65536 products may overflow" : nullptr;
  }
};

inline const Registered<Int8Linear> kInt8Linear;

}  // namespace trimtab
