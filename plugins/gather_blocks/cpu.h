// GatherBlocks on the CPU: of the numbers of all neurons those of the chosen blocks.
#pragma once

#include "../native/rows.h"

namespace trimtab {

struct GatherBlocks {
  static constexpr const char* kName = "GatherBlocks";
  static constexpr ort::Argument kInputs[] = {{}, {}};  // x, blocks
  static constexpr ort::Argument kOutputs[] = {{ort::Type::float32}};

  int64_t block = 1;
  int64_t at_most = 0;  // blocks may be -1

  const char* read(const ort::Runtime& runtime, const ort::KernelInfo* info) {
    runtime.attribute(info, "block", &block);
    runtime.attribute(info, "at_most", &at_most);
    return nullptr;
  }

  const char* compute(const ort::Runtime& runtime, ort::KernelContext* context) const {
    const Tensor x = read_input(runtime, context, 0), blocks = read_input(runtime, context, 1);
    if (x.type != ort::Type::float32 || x.rank < 1 || x.rank > Tensor::kMostDims)
      return "GatherBlocks: x is not float32 [..., neurons]";
    const int64_t tokens = x.rows(), neurons = x.last();
    if (const char* error = check_blocks(blocks, tokens, neurons, block, at_most != 0)) return error;
    const int64_t k = blocks.last(), step = blocks.dims[0] == 1 ? 0 : k;

    int64_t shape[Tensor::kMostDims];
    std::copy_n(x.dims, x.rank, shape);
    shape[x.rank - 1] = k * block;
    auto* y = write_output<float>(runtime, context, 0, shape, x.rank);
    auto task = [&](int64_t t) {
      const float* from = x.floats() + t * neurons;
      const int32_t* chosen = blocks.ints() + t * step;
      float* to = y + t * k * block;
      const int64_t count = chosen_of(chosen, k);
      if (block == 1)
        for (int64_t i = 0; i < count; i++) to[i] = from[chosen[i]];
      else
        for (int64_t i = 0; i < count; i++) std::copy_n(from + chosen[i] * block, block, to + i * block);
      std::fill(to + count * block, to + k * block, 0.0f);
    };
    if (tokens > 0) parallel(runtime, context, tokens, task);
    return nullptr;
  }
};

inline const Registered<GatherBlocks> kGatherBlocks;

}  // namespace trimtab
