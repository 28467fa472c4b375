// SparseDown on the CPU: what the chosen blocks of neurons add to the output.
#pragma once

#include "../native/rows.h"

namespace trimtab {

struct SparseDown {
  static constexpr const char* kName = "SparseDown";
  static constexpr ort::Type kOutput = ort::Type::float32;
  // h, blocks, down, down_scale
  static constexpr ort::Presence kInputs[] = {ort::Presence::required, ort::Presence::required, ort::Presence::required,
                                              ort::Presence::optional};

  int64_t block = 1;

  const char* read(const ort::Runtime& runtime, const ort::KernelInfo* info) {
    runtime.attribute(info, "block", &block);
    return nullptr;
  }

  const char* compute(const ort::Runtime& runtime, ort::KernelContext* context) const {
    const Tensor h = read_input(runtime, context, 0), blocks = read_input(runtime, context, 1);
    const Tensor weight = read_input(runtime, context, 2), scale = read_input(runtime, context, 3);
    if (h.type != ort::Type::float32 || h.rank < 1 || h.rank > Tensor::kMostDims) return "SparseDown: h is not float32 [..., neurons]";
    if (weight.rank != 2) return "SparseDown: weights are not a matrix [neurons, width]";
    const int64_t tokens = h.rows(), count = h.last();
    const int64_t width = weight.last() * (weight.type == ort::Type::uint8 ? 2 : 1);
    Weights down;
    if (const char* error = read_weights(weight, scale, width, &down)) return error;
    if (const char* error = check_blocks(blocks, tokens, down.rows, block)) return error;
    if (count != blocks.last() * block) return "SparseDown: h has another number of neurons than blocks";

    int64_t shape[Tensor::kMostDims];
    std::copy_n(h.dims, h.rank, shape);
    shape[h.rank - 1] = width;
    auto* y = static_cast<float*>(runtime.data(runtime.output(context, 0, shape, h.rank)));
    if (tokens == 0) return nullptr;

    const int64_t groups = blocks.dims[0] == 1 ? 1 : tokens, each = tokens / groups;
    const int64_t parts = std::min(task_count(bytes_of(down.format, count * width)), (width + 127) / 128);
    auto task = [&](int64_t i) {
      const int64_t group = i / parts, first = bound(width, parts, i % parts, 64), last = bound(width, parts, i % parts + 1, 64);
      if (first == last) return;
      const Chosen chosen{blocks.ints() + group * blocks.last(), block};
      float* to = y + group * each * width;
      kernels().sum(down, chosen, count, h.floats() + group * each * count, count, each, first, last, to);
      if (down.format == Format::int4)
        for (int64_t t = 0; t < each; t++) join_places(to + t * width + first, last - first);
    };
    parallel(runtime, context, groups * parts, task);
    return nullptr;
  }
};

}  // namespace trimtab
