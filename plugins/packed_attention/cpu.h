// PackedAttention on the CPU: attention within each of the samples whose tokens are packed one behind the other.
#pragma once

#include <algorithm>
#include <cmath>
#include <thread>
#include <vector>

#include "../native/custom_op.h"
#include "attend.h"

namespace trimtab {

struct PackedAttention {
  static constexpr const char* kName = "PackedAttention";
  static constexpr ort::Argument kOptional = {ort::Type::any, ort::Presence::optional};
  static constexpr ort::Argument kInputs[] = {{}, kOptional, kOptional, {}, kOptional, kOptional};  // q, k, v, offsets, bias, scale
  static constexpr ort::Argument kOutputs[] = {{ort::Type::float32}, {ort::Type::float32, ort::Presence::optional}};

  static constexpr int64_t kFewQueries = 48;  // that a part has at least: its keys are packed for it
  static constexpr int64_t kParts = 8;        // of a sample, where it has the queries for that
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

    whole.context = write_output<float>(runtime, context, 0, {tokens, width});
    whole.context_stride = width;
    auto* received = write_output<float>(runtime, context, 1, {tokens});
    if (tokens > 0) run(runtime, context, whole, received, offsets.ints(), offsets.dims[0] - 1);
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

  // A sample's place among all parts, and among what they receive.
  struct Sample {
    int64_t part, received;
  };
  // Where a task begins.
  struct Start {
    int64_t part, sample;
  };

  // Divides the work into parts, each of some queries of one sample and one head of keys, and these into tasks of equal cost.
  // How a sample is divided hangs on itself alone, so that its sums are the same in any company.
  void run(const ort::Runtime& runtime, ort::KernelContext* context, const AttentionPart& whole, float* received,
           const int32_t* offsets, int64_t batch) const {
    static const int64_t processors = std::max(1u, std::thread::hardware_concurrency());
    static thread_local std::vector<Sample> kept_samples;
    static thread_local std::vector<Start> kept_starts;
    static thread_local std::vector<float> kept_partial;
    std::vector<Sample>& samples = kept_samples;
    std::vector<Start>& starts = kept_starts;
    const auto length = [=](int64_t b) -> int64_t { return offsets[b + 1] - offsets[b]; };

    samples.assign(1, {0, 0});
    int64_t cost = 0;
    for (int64_t b = 0; b < batch; b++) {
      const int64_t parts = kv_heads * parts_of(length(b));
      samples.push_back({samples[b].part + parts, samples[b].received + parts * length(b)});
      cost += cost_of(length(b), whole.dim);
    }
    const int64_t most = std::max(kTaskCost, cost / (8 * processors));
    starts.clear();
    for (int64_t b = 0, sum = most; b < batch; b++) {
      const int64_t parts = samples[b + 1].part - samples[b].part, each = cost_of(length(b), whole.dim) / std::max<int64_t>(parts, 1);
      for (int64_t i = samples[b].part; i < samples[b + 1].part; i++, sum += each) {
        if (sum < most) continue;
        starts.push_back({i, b});
        sum = 0;
      }
    }
    const auto tasks = static_cast<int64_t>(starts.size());
    starts.push_back({samples[batch].part, batch});
    if (received != nullptr && kept_partial.size() < static_cast<size_t>(samples[batch].received))
      kept_partial.resize(samples[batch].received);
    float* partial = kept_partial.data();

    auto task = [&, samples = samples.data(), starts = starts.data()](int64_t t) {
      int64_t b = starts[t].sample;
      for (int64_t i = starts[t].part; i < starts[t + 1].part; i++) {
        while (i >= samples[b + 1].part) b++;
        const int64_t number = i - samples[b].part, each = parts_of(length(b));
        AttentionPart part = part_of(whole, offsets[b], length(b), number / each, number % each, each);
        if (received != nullptr) part.received = partial + samples[b].received + number * length(b);
        attend(part);
      }
    };
    parallel(runtime, context, tasks, task);
    if (received == nullptr) return;
    for (int64_t b = 0; b < batch; b++) {
      const int64_t n = length(b), parts = samples[b + 1].part - samples[b].part;
      float* to = received + offsets[b];
      std::fill_n(to, n, 0.0f);
      for (int64_t i = 0; i < parts; i++)
        for (int64_t t = 0; t < n; t++) to[t] += partial[samples[b].received + i * n + t];
      for (int64_t t = 0; t < n; t++) to[t] /= static_cast<float>(heads * n);
    }
  }

  // Multiply-adds of a sample, and a little for every score.
  int64_t cost_of(int64_t tokens, int64_t dim) const { return heads * tokens * tokens * (2 * dim + 16); }

  // Into how many parts the queries of a head of keys are divided.
  int64_t parts_of(int64_t tokens) const {
    const int64_t rows = tokens * (heads / kv_heads);
    const int64_t wanted = std::min((kParts + kv_heads - 1) / kv_heads, (rows + kFewQueries - 1) / kFewQueries);
    return std::max(wanted, (rows + kMostQueries - 1) / kMostQueries);
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

inline const Registered<PackedAttention> kPackedAttention;

}  // namespace trimtab
