// Int8Linear on the CPU: rows are rounded, multiplied, scaled and activated in one pass over the output.
#pragma once

#include <algorithm>
#include <vector>

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
    if (const ort::Value* value = runtime.constant_input(info, 1)) {
      Tensor weight;
      weight.rank = runtime.shape(value, &weight.type, weight.dims, Tensor::kMostDims);
      weight.data = source = runtime.data(value);
      if (const char* error = check(weight)) return error;
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
    thread_local std::vector<char> integers;
    thread_local std::vector<RowScale> scales;
    if (static_cast<int64_t>(integers.size()) < rows * row_bytes + kLine) integers.resize(rows * row_bytes + kLine);
    if (static_cast<int64_t>(scales.size()) < rows) scales.resize(rows);
    char* q = integers.data() + (kLine - reinterpret_cast<uintptr_t>(integers.data()) % kLine) % kLine;
    RowScale* row_scales = scales.data();
    const int64_t shares = std::clamp<int64_t>(rows * in_features / kRounded, 1, rows);
    auto round = [&](int64_t i) {
      for (int64_t row = rows * i / shares; row < rows * (i + 1) / shares; row++)
        row_scales[row] = use.quantize(x.floats() + row * in_features, in_features, q + row * row_bytes);
    };
    parallel(runtime, context, shares, round);

    const Int8Product product{&w, q, row_bytes, row_scales, scale.floats(), bias.floats(), activation, y};
    const Grid grid(rows, in_features, out_features, use);
    auto multiply = [&](int64_t i) {
      const int64_t a = i / grid.columns, b = i % grid.columns;
      use.multiply(product, rows * a / grid.rows, rows * (a + 1) / grid.rows, grid.panel(b), grid.panel(b + 1));
    };
    parallel(runtime, context, grid.rows * grid.columns, multiply);
    return nullptr;
  }

 private:
  static constexpr int64_t kLine = 64;
  static constexpr int64_t kRounded = 1 << 15;  // values of x that are worth a task of their own
  static constexpr int64_t kProducts = 1 << 17;  // products that are
  static constexpr int64_t kRows = 48;           // that read a panel while it is in the first cache

  static const char* check(const Tensor& weight) {
    if (weight.type != ort::Type::int8 || weight.rank != 2) return "Int8Linear: weight is not int8 [in_features, out_features]";
    return weight.dims[0] > 1 << 16 ? "Int8Linear: sums of more than 65536 products may overflow" : nullptr;
  }

  // Tasks: parts of the rows times parts of the panels, all of about the same size.
  struct Grid {
    int64_t panels, rows, columns;

    Grid(int64_t count, int64_t in_features, int64_t out_features, const Int8Kernels& use)
        : panels((out_features + use.panel - 1) / use.panel), rows((count + kRows - 1) / kRows) {
      const int64_t products = (count + rows - 1) / rows * in_features * out_features;
      columns = std::clamp<int64_t>(products / kProducts, 1, std::max<int64_t>(1, std::min<int64_t>(panels / 2, 16)));
    }

    // The first panel of part i; pairs of them stay together.
    int64_t panel(int64_t i) const { return i == columns ? panels : panels / 2 * i / columns * 2; }
  };
};

inline const Registered<Int8Linear> kInt8Linear;

}  // namespace trimtab
