// KeepTokens on the CPU: which rows of a packed batch stay. Sizes are known once all samples are counted.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../native/custom_op.h"
#include "../native/highest.h"

namespace trimtab {

struct KeepTokens {
  static constexpr const char* kName = "KeepTokens";
  // importance, offsets, threshold
  static constexpr ort::Argument kInputs[] = {{ort::Type::float32}, {ort::Type::int32}, {ort::Type::float32}};
  static constexpr ort::Argument kOutputs[] = {{ort::Type::int32}, {ort::Type::int32}};
  static constexpr int64_t kLeast = 2;  // rows of a sample that stay at least

  bool ratio = false;
  int64_t first = 1;  // whether the first row of a sample is protected

  const char* read(const ort::Runtime& runtime, const ort::KernelInfo* info) {
    char mode[16];
    size_t size = sizeof mode;
    if (runtime.attribute(info, "mode", mode, &size)) ratio = mode[0] == 'r';
    runtime.attribute(info, "first", &first);
    return nullptr;
  }

  const char* compute(const ort::Runtime& runtime, ort::KernelContext* context) const {
    const Tensor importance = read_input(runtime, context, 0), offsets = read_input(runtime, context, 1);
    const Tensor dial = read_input(runtime, context, 2);
    if (importance.rank != 1) return "KeepTokens: importance is not [T]";
    if (offsets.rank != 1 || offsets.dims[0] < 1) return "KeepTokens: offsets are not [batch + 1]";
    const int64_t tokens = importance.dims[0], batch = offsets.dims[0] - 1;
    const int64_t dials = dial.rank == 0 ? 1 : dial.dims[0];
    if (dial.rank > 1 || (dials != 1 && dials != batch)) return "KeepTokens: threshold is not one number, or one for each sample";
    const int32_t* from = offsets.ints();
    if (from[0] != 0 || from[batch] != tokens || !std::is_sorted(from, from + batch + 1))
      return "KeepTokens: offsets do not ascend from 0 to the number of rows";

    int32_t* offsets_out = write_output<int32_t>(runtime, context, 1, {batch + 1});
    std::vector<int32_t> kept;
    kept.reserve(tokens);
    std::vector<float> keys;
    offsets_out[0] = 0;
    for (int64_t b = 0; b < batch; b++) {
      const int64_t begin = from[b], count = from[b + 1] - begin;
      keys.resize(count);
      for (int64_t i = 0; i < count; i++) keys[i] = key(importance.floats()[begin + i]);
      if (first && count > 0) keys[0] = std::numeric_limits<float>::infinity();
      const float setting = dial.floats()[dials == 1 ? 0 : b];
      if (ratio) highest_share(keys, setting, begin, &kept);
      else not_below(keys, setting, begin, &kept);
      offsets_out[b + 1] = static_cast<int32_t>(kept.size());
    }
    const int64_t size = static_cast<int64_t>(kept.size());
    std::copy(kept.begin(), kept.end(), write_output<int32_t>(runtime, context, 0, {size}));
    return nullptr;
  }

 private:
  // NaN stays, whatever happens; -inf is as little as any.
  static float key(float importance) {
    if (std::isnan(importance)) return std::numeric_limits<float>::infinity();
    return std::max(importance, std::numeric_limits<float>::lowest());
  }

  static void not_below(const std::vector<float>& keys, float threshold, int64_t begin, std::vector<int32_t>* kept) {
    const int64_t count = static_cast<int64_t>(keys.size()), take = std::min(kLeast, count);
    if (take == 0) return;
    int32_t best[kLeast];
    highest(keys.data(), 0, count, take, best);
    for (int64_t i = 0, b = 0; i < count; i++) {
      const bool must = b < take && best[b] == i;
      b += must;
      if (must || !(keys[i] < threshold && threshold > 0)) kept->push_back(static_cast<int32_t>(begin + i));
    }
  }

  static void highest_share(const std::vector<float>& keys, float share, int64_t begin, std::vector<int32_t>* kept) {
    const int64_t count = static_cast<int64_t>(keys.size());
    if (count == 0) return;
    const float n = static_cast<float>(count), wanted = std::isnan(share) ? n : std::ceil(share * n);
    const int64_t least = std::min(kLeast, count);
    const int64_t take = wanted >= n ? count : std::max(static_cast<int64_t>(std::max(wanted, 0.0f)), least);
    kept->resize(kept->size() + take);
    highest(keys.data(), begin, count, take, kept->data() + kept->size() - take);
  }
};

inline const Registered<KeepTokens> kKeepTokens;

}  // namespace trimtab
