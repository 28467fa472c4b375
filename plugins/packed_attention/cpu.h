// PackedAttention on the CPU: attention within each of the samples whose tokens are packed one behind the other.
#pragma once

#include <algorithm>
#include <cmath>
#include <thread>
#include <vector>

#include "../native/custom_op.h"
#include "../native/kernels.h"
#include "attend.h"

namespace trimtab {

struct PackedAttention {
  static constexpr const char* kName = "PackedAttention";
  static constexpr ort::Type kOutput = ort::Type::float32;
  // q, k, v, offsets, bias, scale
  static constexpr ort::Presence kInputs[] = {ort::Presence::required, ort::Presence::optional, ort::Presence::optional,
                                              ort::Presence::required, ort::Presence::optional, ort::Presence::optional};

  static constexpr int64_t kFewQueries = 48;   // that a part has at least: its keys are packed for it
  static constexpr int64_t kTaskCost = 1 << 16;  // multiply-adds worth a task of their own

  int64_t heads = 0, kv_heads = 0;

  const char* read(const ort::Runtime& runtime, const ort::KernelInfo* info) {
    runtime.attribute(info, "heads", &heads);
    runtime.attribute(info, "kv_heads", &kv_heads);
    if (kv_heads == 0) kv_heads = heads;
    const bool right = heads > 0 && kv_heads > 0 && heads % kv_heads == 0;
    return right ? nullptr : "PackedAttention: heads is not a multiple of kv_heads, or not above 0";
  }

  const char* compute(const ort::Runtime& runtime, ort::KernelContext* context) const {
    AttentionPart whole = {};
    const Tensor q = read_input(runtime, context, 0), k = read_input(runtime, context, 1), v = read_input(runtime, context, 2);
    const Tensor offsets = read_input(runtime, context, 3), bias = read_input(runtime, context, 4);
    const Tensor scale = read_input(runtime, context, 5);
    if (const char* error = read_tokens(q, k, v, &whole)) return error;
    const int64_t tokens = q.dims[0], width = heads * whole.dim;
    int64_t longest = 0;
    if (const char* error = check_offsets(offsets, tokens, &longest)) return error;
    if (const char* error = read_bias(bias, longest, &whole)) return error;
    if (scale && (scale.type != ort::Type::float32 || scale.rank != 0)) return "PackedAttention: scale is not a float32 scalar";
    whole.scale = scale ? scale.floats()[0] : 1 / std::sqrt(static_cast<float>(whole.dim));

    const int64_t shape[] = {tokens, width};
    whole.context = static_cast<float*>(runtime.data(runtime.output(context, 0, shape, 2)));
    whole.context_stride = width;
    if (tokens > 0) run(runtime, context, whole, offsets.ints(), offsets.dims[0] - 1);
    return nullptr;
  }

 private:
  static bool matrix(const Tensor& tensor) { return tensor.type == ort::Type::float32 && tensor.rank == 2; }

  // Where q, k and v are, of the first token and head.
  const char* read_tokens(const Tensor& q, const Tensor& k, const Tensor& v, AttentionPart* out) const {
    if (!matrix(q)) return "PackedAttention: q is not float32 [tokens, width]";
    if (static_cast<bool>(k) != static_cast<bool>(v)) return "PackedAttention: k and v are given both or not at all";
    const int64_t columns = k ? heads : heads + 2 * kv_heads;
    if (q.dims[1] == 0 || q.dims[1] % columns != 0) return "PackedAttention: the width of q is no multiple of its heads";
    out->dim = q.dims[1] / columns;
    out->group = heads / kv_heads;
    out->q = q.floats();
    out->q_stride = q.dims[1];
    if (!k) {
      out->k = out->q + heads * out->dim;
      out->v = out->k + kv_heads * out->dim;
      out->k_stride = out->v_stride = q.dims[1];
      return nullptr;
    }
    for (const Tensor* other : {&k, &v})
      if (!matrix(*other) || other->dims[0] != q.dims[0] || other->dims[1] != kv_heads * out->dim)
        return "PackedAttention: k and v are not float32 [tokens of q, kv_heads * head size of q]";
    out->k = k.floats();
    out->v = v.floats();
    out->k_stride = out->v_stride = k.dims[1];
    return nullptr;
  }

  static const char* check_offsets(const Tensor& offsets, int64_t tokens, int64_t* longest) {
    if (offsets.type != ort::Type::int32 || offsets.rank != 1 || offsets.dims[0] < 1)
      return "PackedAttention: offsets are not int32 [batch + 1]";
    const int32_t* at = offsets.ints();
    const int64_t batch = offsets.dims[0] - 1;
    if (at[0] != 0 || at[batch] != tokens) return "PackedAttention: offsets do not go from 0 to the number of tokens";
    for (int64_t b = 0; b < batch; b++) {
      if (at[b] > at[b + 1]) return "PackedAttention: offsets descend";
      *longest = std::max<int64_t>(*longest, at[b + 1] - at[b]);
    }
    return nullptr;
  }

  const char* read_bias(const Tensor& bias, int64_t longest, AttentionPart* out) const {
    if (!bias) return nullptr;
    if (bias.type != ort::Type::float32 || bias.rank < 2 || bias.rank > 4 || (bias.rank == 4 && bias.dims[0] != 1))
      return "PackedAttention: bias is not float32 [1 or heads, size, size]";
    const int64_t of = bias.rank == 2 ? 1 : bias.dims[bias.rank - 3], size = bias.dims[bias.rank - 2];
    if (of != 1 && of != heads) return "PackedAttention: bias is for another number of heads";
    if (size < longest || bias.last() < longest) return "PackedAttention: bias is for shorter samples";
    out->bias = bias.floats();
    out->bias_stride = bias.last();
    out->bias_head = of == 1 ? 0 : size * bias.last();
    return nullptr;
  }

  // Parts of equal cost, each of some queries of one sample and one head of keys, as tasks for the session's threads.
  void run(const ort::Runtime& runtime, ort::KernelContext* context, const AttentionPart& whole, const int32_t* offsets,
           int64_t batch) const {
    static const int64_t processors = std::max(1u, std::thread::hardware_concurrency());
    static thread_local std::vector<int64_t> kept;  // first part of each sample
    int64_t cost = 0;
    for (int64_t b = 0; b < batch; b++) cost += cost_of(offsets[b + 1] - offsets[b], whole.dim);
    cost *= heads;
    const int64_t tasks = std::clamp<int64_t>(cost / kTaskCost, 1, 8 * processors);
    std::vector<int64_t>& starts = kept;
    starts.assign(batch + 1, 0);
    for (int64_t b = 0; b < batch; b++) {
      const int64_t n = offsets[b + 1] - offsets[b];
      starts[b + 1] = starts[b] + kv_heads * parts_of(n, whole, cost / tasks);
    }
    const int64_t parts = starts[batch];
    auto task = [&, starts = starts.data()](int64_t t) {
      int64_t i = parts * t / tasks;
      const int64_t end = parts * (t + 1) / tasks;
      int64_t b = std::upper_bound(starts, starts + batch + 1, i) - starts - 1;
      for (; i < end; i++) {
        while (i >= starts[b + 1]) b++;
        const int64_t n = offsets[b + 1] - offsets[b], each = (starts[b + 1] - starts[b]) / kv_heads;
        kernels().attend(part_of(whole, offsets[b], n, (i - starts[b]) / each, (i - starts[b]) % each, each));
      }
    };
    parallel(runtime, context, tasks, task);
  }

  // Multiply-adds of one head of a sample, and a little for every score.
  static int64_t cost_of(int64_t tokens, int64_t dim) { return tokens * tokens * (2 * dim + 16); }

  // Into how many parts the queries of a head of keys are divided, so that none costs more than `most`.
  int64_t parts_of(int64_t tokens, const AttentionPart& whole, int64_t most) const {
    const int64_t rows = tokens * whole.group;
    if (rows == 0) return 0;
    const int64_t fair = whole.group * cost_of(tokens, whole.dim) / std::max<int64_t>(most, 1);
    const int64_t parts = std::min(std::max<int64_t>(fair, 1), (rows + kFewQueries - 1) / kFewQueries);
    return std::max(parts, (rows + kMostQueries - 1) / kMostQueries);
  }

  // Part `number` of `count` of one head of keys of a sample.
  static AttentionPart part_of(const AttentionPart& whole, int64_t start, int64_t tokens, int64_t head, int64_t number,
                               int64_t count) {
    AttentionPart part = whole;
    const int64_t rows = tokens * whole.group, query = head * whole.group * whole.dim;
    part.tokens = tokens;
    part.first = rows * number / count;
    part.last = rows * (number + 1) / count;
    part.q += start * whole.q_stride + query;
    part.k += start * whole.k_stride + head * whole.dim;
    part.v += start * whole.v_stride + head * whole.dim;
    part.context += start * whole.context_stride + query;
    if (part.bias != nullptr) part.bias += head * whole.group * whole.bias_head;
    return part;
  }
};

}  // namespace trimtab
