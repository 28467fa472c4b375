// Glu on the CPU: act(gate) * up of rows that hold both.
#pragma once

#include <algorithm>

#include "../native/activation.h"
#include "../native/grid.h"
#include "../native/kernels.h"

namespace trimtab {

struct Glu {
  static constexpr const char* kName = "Glu";
  static constexpr ort::Argument kInputs[] = {{}};  // x
  static constexpr ort::Argument kOutputs[] = {{ort::Type::float32}};

  Activation activation = Activation::silu;
  int64_t gate = 0;  // the half that it is

  const char* read(const ort::Runtime& runtime, const ort::KernelInfo* info) {
    char name[32];
    size_t size = sizeof name;
    if (runtime.attribute(info, "activation", name, &size)) activation = activation_named(name);
    runtime.attribute(info, "gate", &gate);
    if (gate != 0 && gate != 1) return "Glu: gate is 0 or 1";
    return activation == Activation::unknown ? "Glu: unknown activation" : nullptr;
  }

  const char* compute(const ort::Runtime& runtime, ort::KernelContext* context) const {
    const Tensor x = read_input(runtime, context, 0);
    if (x.type != ort::Type::float32 || x.rank < 1 || x.rank > Tensor::kMostDims || x.last() % 2 != 0)
      return "Glu: x is not float32 [..., 2 neurons]";
    const int64_t neurons = x.last() / 2, rows = x.rows();
    int64_t shape[Tensor::kMostDims];
    std::copy_n(x.dims, x.rank, shape);
    shape[x.rank - 1] = neurons;
    auto* y = write_output<float>(runtime, context, 0, shape, x.rank);
    if (rows == 0 || neurons == 0) return nullptr;
    each_row(runtime, context, rows, x.last(), [&](int64_t row) {
      const float* both = x.floats() + row * x.last();
      float* out = y + row * neurons;
      std::copy_n(both + (1 - gate) * neurons, neurons, out);
      kernels().finish(activation, out, both + gate * neurons, neurons);
    });
    return nullptr;
  }
};

inline const Registered<Glu> kGlu;

}  // namespace trimtab
