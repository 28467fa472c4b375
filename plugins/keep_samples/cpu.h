// KeepSamples on the CPU: which samples of a packed batch stay, with the rows that are theirs.
#pragma once

#include <algorithm>
#include <vector>

#include "../native/custom_op.h"

namespace trimtab {

struct KeepSamples {
  static constexpr const char* kName = "KeepSamples";
  static constexpr ort::Argument kInputs[] = {{}, {}, {ort::Type::int32}, {}};  // uncertainty, threshold, offsets, x
  static constexpr ort::Argument kOutputs[] = {{ort::Type::int32}, {ort::Type::int32}, {ort::Type::int32}};

  const char* read(const ort::Runtime&, const ort::KernelInfo*) { return nullptr; }

  const char* compute(const ort::Runtime& runtime, ort::KernelContext* context) const {
    const Tensor uncertainty = read_input(runtime, context, 0), dial = read_input(runtime, context, 1);
    const Tensor offsets = read_input(runtime, context, 2), x = read_input(runtime, context, 3);
    if (uncertainty.type != ort::Type::float32 || uncertainty.rank != 1)
      return "KeepSamples: uncertainty is not float32 [batch]";
    const int64_t batch = uncertainty.dims[0];
    const int64_t dials = dial.rank == 0 ? 1 : dial.dims[0];
    if (dial.type != ort::Type::float32 || dial.rank > 1 || (dials != 1 && dials != batch))
      return "KeepSamples: threshold is not one float32, or one for each sample";
    if (offsets.rank != 1 || offsets.dims[0] != batch + 1) return "KeepSamples: offsets are not [batch + 1]";
    const int32_t* from = offsets.ints();
    if (x.rank == 0 || from[0] != 0 || from[batch] != x.dims[0] || !std::is_sorted(from, from + batch + 1))
      return "KeepSamples: offsets do not ascend from 0 to the number of rows";

    std::vector<int32_t> stay, starts = {0};
    for (int32_t b = 0; b < batch; b++) {
      if (uncertainty.floats()[b] < dial.floats()[dials == 1 ? 0 : b]) continue;
      stay.push_back(b);
      starts.push_back(starts.back() + from[b + 1] - from[b]);
    }
    int32_t* row = write_output<int32_t>(runtime, context, 1, {starts.back()});
    for (const int32_t b : stay)
      for (int32_t i = from[b]; i < from[b + 1]; i++) *row++ = i;
    write(runtime, context, 0, stay);
    write(runtime, context, 2, starts);
    return nullptr;
  }

 private:
  static void write(const ort::Runtime& runtime, ort::KernelContext* context, size_t index,
                    const std::vector<int32_t>& numbers) {
    const auto size = static_cast<int64_t>(numbers.size());
    std::copy(numbers.begin(), numbers.end(), write_output<int32_t>(runtime, context, index, {size}));
  }
};

inline const Registered<KeepSamples> kKeepSamples;

}  // namespace trimtab
