// SparseUp on the CPU: activations of the chosen blocks of an FFN's neurons.
#pragma once

#include "../native/activation.h"
#include "../native/highest.h"
#include "../native/rows.h"

namespace trimtab {

struct SparseUp {
  static constexpr const char* kName = "SparseUp";
  static constexpr ort::Argument kOptional{ort::Type::any, ort::Presence::optional};
  // x, blocks, up, up_scale, up_bias, gate, gate_scale, gate_bias, importance
  static constexpr ort::Argument kInputs[] = {{}, {}, {}, kOptional, kOptional, kOptional, kOptional, kOptional, kOptional};
  static constexpr ort::Argument kOutputs[] = {{ort::Type::float32}};

  Activation activation = Activation::identity;
  int64_t block = 1;
  int64_t keep = 0;  // of the chosen blocks, those that add most; 0: all
  Resident resident_up, resident_gate;

  const char* read(const ort::Runtime& runtime, const ort::KernelInfo* info) {
    char name[32];
    size_t size = sizeof name;
    if (runtime.attribute(info, "activation", name, &size)) activation = activation_named(name);
    if (activation == Activation::unknown) return "SparseUp: unknown activation";
    runtime.attribute(info, "block", &block);
    runtime.attribute(info, "keep", &keep);
    resident_up.take(runtime, info, 2);
    resident_gate.take(runtime, info, 5);
    return nullptr;
  }

  const char* compute(const ort::Runtime& runtime, ort::KernelContext* context) const {
    Tensor in[9];
    for (size_t i = 0; i < 9; i++) in[i] = read_input(runtime, context, i);
    const Tensor &x = in[0], &blocks = in[1];
    if (x.type != ort::Type::float32 || x.rank < 1 || x.rank > Tensor::kMostDims) return "SparseUp: x is not float32 [..., width]";
    const int64_t tokens = x.rows(), width = x.last();
    Weights up, gate;
    if (const char* error = read_weights(resident_up.of(in[2]), in[3], width, &up)) return error;
    if (in[5]) {
      if (const char* error = read_weights(resident_gate.of(in[5]), in[6], width, &gate)) return error;
      if (gate.format != up.format || gate.rows != up.rows) return "SparseUp: up and gate differ in type or neurons";
    }
    if (const char* error = check_blocks(blocks, tokens, up.rows, block)) return error;
    if (in[8] && (in[8].type != ort::Type::float32 || in[8].rows() * in[8].last() != up.rows))
      return "SparseUp: importance is not float32 [neurons]";

    const int64_t k = blocks.last(), count = k * block;
    int64_t shape[Tensor::kMostDims];
    std::copy_n(x.dims, x.rank, shape);
    shape[x.rank - 1] = count;
    auto* out = write_output<float>(runtime, context, 0, shape, x.rank);
    if (tokens == 0 || count == 0) return nullptr;

    // One selection for all tokens is one group; otherwise each token is one.
    const int64_t groups = blocks.dims[0] == 1 ? 1 : tokens, each = tokens / groups;
    const Prepared prepared(x.floats(), tokens, each, width, up.format);
    const int64_t matrices = in[5] ? 2 : 1;
    const int64_t parts = task_count(matrices * bytes_of(up.format, count * width));
    auto task = [&](int64_t i) {
      const int64_t group = i / parts, begin = bound(count, parts, i % parts, 4), end = bound(count, parts, i % parts + 1, 4);
      if (begin == end) return;
      const Chosen chosen{blocks.ints() + group * k, block};
      const Activations mine = prepared.view().from(group * each, width);
      float* to = out + group * each * count + begin;
      const Kernels& use = kernels();
      use.dot(up, chosen, begin, end, mine, each, to, count, in[5] ? &gate : nullptr);
      std::vector<float> gated;
      if (in[5]) {
        gated.resize(each * (end - begin));
        use.dot(gate, chosen, begin, end, mine, each, gated.data(), end - begin, nullptr);
      }
      for (int64_t t = 0; t < each; t++)
        for (int64_t j = 0; j < end - begin; j++) {
          const int64_t row = chosen.row(begin + j);
          float& h = to[t * count + j];
          if (in[4]) h += in[4].floats()[row];
          if (in[5]) {
            const float g = gated[t * (end - begin) + j] + (in[7] ? in[7].floats()[row] : 0.0f);
            h *= activate(activation, g);
          } else {
            h = activate(activation, h);
          }
        }
    };
    parallel(runtime, context, groups * parts, task);
    if (in[8] && keep > 0 && keep < k) {
      auto rest = [&](int64_t t) {
        const Chosen chosen{blocks.ints() + (groups == 1 ? 0 : t) * k, block};
        keep_best(chosen, k, in[8].floats(), out + t * count);
      };
      parallel(runtime, context, tokens, rest);
    }
    return nullptr;
  }

 private:
  // Leaves h, [k * block], of a token as it is in the `keep` blocks of the largest sum of |h| * importance; elsewhere 0.
  void keep_best(const Chosen& chosen, int64_t k, const float* importance, float* h) const {
    thread_local std::vector<float> scores;
    thread_local std::vector<int32_t> best;
    scores.assign(k, 0.0f);
    best.resize(keep);
    for (int64_t i = 0; i < k * block; i++) scores[i / block] += std::fabs(h[i]) * importance[chosen.row(i)];
    highest(scores.data(), 0, k, keep, best.data());
    for (int64_t i = 0, b = 0; i < k; i++) {
      if (b < keep && best[b] == i) b++;
      else std::fill_n(h + i * block, block, 0.0f);
    }
  }
};

inline const Registered<SparseUp> kSparseUp;

}  // namespace trimtab
