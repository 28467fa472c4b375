// PoolTokens on the CPU: the mean of the first rows of each sample of a packed batch.
#pragma once

#include <algorithm>

#include "../native/custom_op.h"

namespace trimtab {

struct PoolTokens {
  static constexpr const char* kName = "PoolTokens";
  static constexpr ort::Argument kInputs[] = {{}, {ort::Type::int32}};  // x, offsets
  static constexpr ort::Argument kOutputs[] = {{ort::Type::float32}};

  int64_t most = 0;  // rows of a sample that count; 0: all

  const char* read(const ort::Runtime& runtime, const ort::KernelInfo* info) {
    runtime.attribute(info, "most", &most);
    return most < 0 ? "PoolTokens: most is below 0" : nullptr;
  }

  const char* compute(const ort::Runtime& runtime, ort::KernelContext* context) const {
    const Tensor x = read_input(runtime, context, 0), offsets = read_input(runtime, context, 1);
    if (x.type != ort::Type::float32 || x.rank != 2) return "PoolTokens: x is not float32 [T, width]";
    if (offsets.rank != 1 || offsets.dims[0] < 1) return "PoolTokens: offsets are not [batch + 1]";
    const int64_t batch = offsets.dims[0] - 1, width = x.dims[1];
    const int32_t* from = offsets.ints();
    if (from[0] != 0 || from[batch] != x.dims[0] || !std::is_sorted(from, from + batch + 1))
      return "PoolTokens: offsets do not ascend from 0 to the number of rows";

    auto* y = write_output<float>(runtime, context, 0, {batch, width});
    for (int64_t b = 0; b < batch; b++, y += width) {
      const int64_t own = from[b + 1] - from[b], count = most == 0 ? own : std::min(own, most);
      const float* row = x.floats() + from[b] * width;
      std::fill_n(y, width, 0.0f);
      for (int64_t i = 0; i < count; i++, row += width)
        for (int64_t d = 0; d < width; d++) y[d] += row[d];
      if (count > 1)
        for (int64_t d = 0; d < width; d++) y[d] /= static_cast<float>(count);
    }
    return nullptr;
  }
};

inline const Registered<PoolTokens> kPoolTokens;

}  // namespace trimtab
