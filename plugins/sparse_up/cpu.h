// SparseUp on the CPU: activations of the chosen blocks of an FFN's neurons.
#pragma once

#include "../native/activation.h"
#include "../native/by_block.h"
#include "../native/highest.h"
#include "../native/resident.h"

namespace trimtab {

struct SparseUp {
  static constexpr const char* kName = "SparseUp";
  static constexpr ort::Argument kOptional{ort::Type::any, ort::Presence::optional};
  // x, blocks, up, up_scale, up_bias, gate, gate_scale, gate_bias, importance
  static constexpr ort::Argument kInputs[] = {{}, {}, {}, kOptional, kOptional, kOptional, kOptional, kOptional, kOptional};
  static constexpr ort::Argument kOutputs[] = {{ort::Type::float32}};

  Activation activation = Activation::identity;
  int64_t block = 1;
  int64_t keep = 0;     // of the chosen blocks, those that add most; 0: all
  int64_t at_most = 0;  // blocks may be -1
  Inputs inputs;
  Resident resident_up, resident_gate;

  const char* read(const ort::Runtime& runtime, const ort::KernelInfo* info) {
    char name[32];
    size_t size = sizeof name;
    if (runtime.attribute(info, "activation", name, &size)) activation = activation_named(name);
    if (activation == Activation::unknown) return "SparseUp: unknown activation";
    runtime.attribute(info, "block", &block);
    runtime.attribute(info, "keep", &keep);
    runtime.attribute(info, "at_most", &at_most);
    inputs.take(runtime, info, 9);
    resident_up.take(runtime, info, 2, &PackedKernels::up, block);
    resident_gate.take(runtime, info, 5, &PackedKernels::up, block);
    return nullptr;
  }

  const char* compute(const ort::Runtime& runtime, ort::KernelContext* context) const {
    Tensor in[9];
    for (size_t i = 0; i < 9; i++) in[i] = inputs.read(runtime, context, i);
    const Tensor &x = in[0], &blocks = in[1];
    if (x.type != ort::Type::float32 || x.rank < 1 || x.rank > Tensor::kMostDims) return "SparseUp: x is not float32 [..., width]";
    const int64_t tokens = x.rows(), width = x.last();
    Weights up, gate;
    if (const char* error = read_weights(resident_up.of(in[2]), in[3], width, &up)) return error;
    if (in[5]) {
      if (const char* error = read_weights(resident_gate.of(in[5]), in[6], width, &gate)) return error;
      if (gate.format != up.format || gate.rows != up.rows) return "SparseUp: up and gate differ in type or neurons";
    }
    resident_up.add_packed(&up), resident_gate.add_packed(&gate);
    if (in[5] && (up.packed == nullptr || gate.packed == nullptr)) up.packed = gate.packed = nullptr;
    if (const char* error = check_blocks(blocks, tokens, up.rows, block, at_most != 0)) return error;
    if (!one_for_each(in[4], up.rows) || !one_for_each(in[7], up.rows)) return "biases are not float32 [neurons]";
    if (!one_for_each(in[8], up.rows)) return "importance is not float32 [neurons]";

    const int64_t k = blocks.last(), count = k * block;
    int64_t shape[Tensor::kMostDims];
    std::copy_n(x.dims, x.rank, shape);
    shape[x.rank - 1] = count;
    auto* out = write_output<float>(runtime, context, 0, shape, x.rank);
    if (tokens == 0 || count == 0) return nullptr;

    // One selection for all tokens is one group; otherwise each token is one.
    const int64_t groups = blocks.dims[0] == 1 ? 1 : tokens, each = tokens / groups;
    const Call call{in, &up, in[5] ? &gate : nullptr, tokens, width, k, count, out};
    if (up.packed != nullptr || ((groups > 1 || tokens >= kSome) && block >= kRowsTogether)) by_block(runtime, context, call);
    else by_group(runtime, context, call, groups, each);
    if (in[8] && keep > 0 && keep < k) {
      auto rest = [&](int64_t t) {
        const Chosen chosen{blocks.ints() + (groups == 1 ? 0 : t) * k, block};
        const int64_t some = chosen_of(chosen.blocks, k);
        if (keep < some) keep_best(chosen, some, in[8].floats(), out + t * count);
      };
      parallel(runtime, context, tokens, rest);
    }
    return nullptr;
  }

 private:
  struct Call {
    const Tensor* in;
    const Weights *up, *gate;  // no gate: nullptr
    int64_t tokens, width, k, count;  // count: places of h
    float* out;
  };

  // Each group of tokens with its own choice.
  void by_group(const ort::Runtime& runtime, ort::KernelContext* context, const Call& call, int64_t groups, int64_t each) const {
    const Prepared prepared(call.in[0].floats(), call.tokens, each, *call.up);
    const int64_t matrices = call.gate != nullptr ? 2 : 1;
    const int64_t parts = task_count(matrices * bytes_of(call.up->format, call.count * call.width));
    auto task = [&](int64_t i) {
      const int64_t group = i / parts, part = i % parts;
      const Chosen chosen{call.in[1].ints() + group * call.k, block};
      const int64_t there = block * chosen_of(chosen.blocks, call.k);
      if (part == 0)
        for (int64_t t = group * each; t < (group + 1) * each; t++) std::fill(call.out + t * call.count + there, call.out + (t + 1) * call.count, 0.0f);
      const int64_t begin = bound(there, parts, part, 4), end = bound(there, parts, part + 1, 4);
      if (begin == end) return;
      const Activations mine = prepared.view().from(group * each, call.width);
      float* to = call.out + group * each * call.count + begin;
      const auto dot = prepared.dot();
      dot(*call.up, chosen, begin, end, mine, each, to, call.count, {call.gate, chosen, begin, end}, nullptr);
      static thread_local std::vector<float> gated;
      if (call.gate != nullptr) {
        gated.resize(each * (end - begin));
        dot(*call.gate, chosen, begin, end, mine, each, gated.data(), end - begin, {}, nullptr);
      }
      for (int64_t t = 0; t < each; t++) {
        float *h = to + t * call.count, *g = call.gate != nullptr ? gated.data() + t * (end - begin) : nullptr;
        finish(call, chosen, begin, end, h, g);
      }
    };
    parallel(runtime, context, groups * parts, task);
  }

  // Each block is read once for all tokens that take it.
  void by_block(const ort::Runtime& runtime, ort::KernelContext* context, const Call& call) const {
    const int32_t* chosen = call.in[1].ints();
    const int64_t all = call.up->rows / block, matrices = call.gate != nullptr ? 2 : 1;
    const int64_t stride = call.in[1].dims[0] == 1 ? 0 : call.k;
    std::vector<ByBlock> turned;
    int64_t together = 0;
    for (int64_t t = 0; t < call.tokens; t += kTogether) {
      turned.emplace_back(chosen + t * stride, stride, std::min(kTogether, call.tokens - t), call.k, all,
                          [](int64_t, int64_t) { return false; });
      together = std::max(together, turned.back().together());
    }
    const Prepared prepared(call.in[0].floats(), call.tokens, together, *call.up);
    const int64_t parts = task_count(matrices * bytes_of(call.up->format, call.up->rows * call.width));
    auto task = [&](int64_t i) {
      const int64_t first = i / parts * kTogether, part = i % parts, tokens = std::min(kTogether, call.tokens - first);
      const Takers takers = turned[i / parts].takers(block);
      const Activations mine = prepared.view().from(first, call.width);
      const auto dot = prepared.dot();
      static thread_local std::vector<float> made, gated;
      for (int64_t b = bound(takers.count, parts, part, 1), end = bound(takers.count, parts, part + 1, 1); b < end; b++) {
        const int32_t* numbers = takers.tokens + takers.starts[b];
        const int64_t some = takers.starts[b + 1] - takers.starts[b];
        const Chosen rows{takers.blocks + b, block};
        Wanted next;
        if (b + 1 < end) next = {call.up, {takers.blocks + b + 1, block}, 0, block};
        made.resize(some * block);
        dot(*call.up, rows, 0, block, mine, some, made.data(), block,
                call.gate != nullptr ? Wanted{call.gate, rows, 0, block} : next, numbers);
        if (call.gate != nullptr) {
          gated.resize(some * block);
          dot(*call.gate, rows, 0, block, mine, some, gated.data(), block, next, numbers);
        }
        if (call.in[4]) add_bias(call.in[4].floats() + rows.row(0), some, made.data());
        if (call.gate != nullptr && call.in[7]) add_bias(call.in[7].floats() + rows.row(0), some, gated.data());
        kernels().finish(activation, made.data(), call.gate != nullptr ? gated.data() : nullptr, some * block);
        for (int64_t t = 0; t < some; t++)
          std::copy_n(made.data() + t * block, block,
                      call.out + (first + numbers[t]) * call.count + takers.places[takers.starts[b] + t] * block);
      }
      for (int64_t t = first + bound(tokens, parts, part, 1), end = first + bound(tokens, parts, part + 1, 1); t < end; t++)
        std::fill(call.out + t * call.count + block * chosen_of(chosen + t * stride, call.k), call.out + (t + 1) * call.count, 0.0f);
    };
    parallel(runtime, context, static_cast<int64_t>(turned.size()) * parts, task);
  }

  // A block's biases to the sums of `tokens` tokens.
  void add_bias(const float* bias, int64_t tokens, float* sums) const {
    for (int64_t t = 0; t < tokens; t++, sums += block)
      for (int64_t j = 0; j < block; j++) sums[j] += bias[j];
  }

  // Biases and activation of the places begin to end of a choice.
  void finish(const Call& call, const Chosen& chosen, int64_t begin, int64_t end, float* h, float* gate) const {
    const Tensor &bias = call.in[4], &gate_bias = call.in[7];
    if (bias)
      for (int64_t j = begin; j < end; j++) h[j - begin] += bias.floats()[chosen.row(j)];
    if (gate != nullptr && gate_bias)
      for (int64_t j = begin; j < end; j++) gate[j - begin] += gate_bias.floats()[chosen.row(j)];
    kernels().finish(activation, h, gate, end - begin);
  }

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
