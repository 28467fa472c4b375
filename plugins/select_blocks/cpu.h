// SelectBlocks on the CPU: the blocks of highest score, in ascending order of their numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../native/custom_op.h"
#include "../native/highest.h"

namespace trimtab {

struct SelectBlocks {
  static constexpr const char* kName = "SelectBlocks";
  static constexpr ort::Argument kInputs[] = {{}};  // scores
  static constexpr ort::Argument kOutputs[] = {{ort::Type::int32}};

  int64_t k = 1;
  int64_t shared = 0;       // one selection for all tokens, by each block's highest score
  int64_t shards = 1;       // parts of the blocks that narrow down on their own
  int64_t dense_above = -1;  // more tokens than this take all blocks, in one row; -1: never
  int64_t at_most = 0;       // of the k, those below 0 are left out, except the best of all; -1 in their places, at the end

  const char* read(const ort::Runtime& runtime, const ort::KernelInfo* info) {
    runtime.attribute(info, "k", &k);
    runtime.attribute(info, "shared", &shared);
    runtime.attribute(info, "shards", &shards);
    runtime.attribute(info, "dense_above", &dense_above);
    runtime.attribute(info, "at_most", &at_most);
    return k < 1 || shards < 1 ? "SelectBlocks: k and shards are at least 1" : nullptr;
  }

  const char* compute(const ort::Runtime& runtime, ort::KernelContext* context) const {
    const Tensor scores = read_input(runtime, context, 0);
    if (scores.type != ort::Type::float32 || scores.rank < 1 || scores.rank > Tensor::kMostDims)
      return "SelectBlocks: scores are not float32 [..., blocks]";
    const int64_t tokens = scores.rows(), blocks = scores.last();
    const bool all = dense_above >= 0 && tokens > dense_above;
    if (blocks % shards != 0) return "SelectBlocks: the number of shards does not divide that of blocks";
    if (!all && k > shards * local(blocks)) return "SelectBlocks: k is more than there are blocks";
    const int64_t take = all ? blocks : k, rows = shared || all ? 1 : tokens;
    auto* out = write_output<int32_t>(runtime, context, 0, {rows, take});
    std::vector<float> most;
    const float* from = scores.floats();
    if (shared && !all && tokens != 1) {
      most.assign(blocks, -INFINITY);
      for (int64_t t = 0; t < tokens; t++)
        for (int64_t b = 0; b < blocks; b++) most[b] = std::max(most[b], from[t * blocks + b]);
      from = most.data();
    }
    for (int64_t row = 0; row < rows; row++, from += blocks, out += take) {
      select(from, blocks, take, out);
      if (at_most != 0 && !all) leave_out(from, take, out);
    }
    return nullptr;
  }

 private:
  // What each shard hands on.
  int64_t local(int64_t blocks) const { return std::min((k + shards - 1) / shards, blocks / shards); }

  // Takes those that are below 0 out of the chosen ones; the best stays, of equal ones the first.
  static void leave_out(const float* scores, int64_t take, int32_t* chosen) {
    const int32_t best = *std::max_element(chosen, chosen + take, [&](int32_t a, int32_t b) { return scores[a] < scores[b]; });
    int32_t* end = std::remove_if(chosen, chosen + take, [&](int32_t b) { return !(scores[b] >= 0) && b != best; });
    std::fill(end, chosen + take, -1);
  }

  void select(const float* scores, int64_t blocks, int64_t take, int32_t* out) const {
    if (take == blocks) {
      for (int64_t b = 0; b < blocks; b++) out[b] = static_cast<int32_t>(b);
      return;
    }
    if (shards == 1) {
      highest(scores, 0, blocks, take, out);
      return;
    }
    const int64_t each = local(blocks), width = blocks / shards;
    std::vector<int32_t> candidates(shards * each), chosen(take);
    std::vector<float> theirs(shards * each);
    for (int64_t s = 0; s < shards; s++) highest(scores + s * width, s * width, width, each, candidates.data() + s * each);
    for (size_t i = 0; i < candidates.size(); i++) theirs[i] = scores[candidates[i]];
    highest(theirs.data(), 0, shards * each, take, chosen.data());
    for (int64_t i = 0; i < take; i++) out[i] = candidates[chosen[i]];
  }
};

inline const Registered<SelectBlocks> kSelectBlocks;

}  // namespace trimtab
