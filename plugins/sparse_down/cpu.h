// SparseDown on the CPU: what the chosen blocks of neurons add to the output.
#pragma once

#include "../native/by_block.h"
#include "../native/resident.h"

namespace trimtab {

struct SparseDown {
  static constexpr const char* kName = "SparseDown";
  static constexpr ort::Argument kOptional{ort::Type::any, ort::Presence::optional};
  static constexpr ort::Argument kInputs[] = {{}, {}, {}, kOptional};  // h, blocks, down, down_scale
  static constexpr ort::Argument kOutputs[] = {{ort::Type::float32}};

  static constexpr int64_t kMostParts = 8;
  static constexpr int64_t kMostPartial = 1 << 16;  // floats of partial sums that are worth adding up
  static constexpr int64_t kMostPartialBlocks = 1 << 19;  // of several tokens, which read their weights once
  static constexpr int64_t kPartialRows = 16;             // of the weights that a row of partial sums has to save
  static constexpr int64_t kSlice = 1 << 12;              // sums that are worth a task of their own
  static constexpr int64_t kRounded = 1 << 13;            // values of h that are

  // The blocks of each group of tokens. What of one token's is zero adds nothing, and its rows need not be read: those that
  // SparseUp did not keep, and many of ReLU's.
  class Used {
   public:
    Used(const float* h, const Tensor& blocks, int64_t groups, bool one, int64_t block)
        : h_(h), blocks_(blocks.ints()), k_(blocks.last()), block_(block) {
      if (!one) return;
      starts_.assign(1, 0);
      for (int64_t g = 0; g < groups; g++) {
        for (int64_t i = g * k_; i < (g + 1) * k_ && blocks_[i] >= 0; i++) {
          if (std::all_of(h + i * block, h + (i + 1) * block, [](float value) { return value == 0; })) continue;
          numbers_.push_back(blocks_[i]);
          values_.insert(values_.end(), h + i * block, h + (i + 1) * block);
        }
        starts_.push_back(static_cast<int64_t>(numbers_.size()));
      }
    }

    int64_t count(int64_t group) const {
      return starts_.empty() ? chosen_of(blocks_ + group * k_, k_) : starts_[group + 1] - starts_[group];
    }
    const int32_t* blocks(int64_t group) const {
      return starts_.empty() ? blocks_ + group * k_ : numbers_.data() + starts_[group];
    }
    const float* h(int64_t group) const {
      return starts_.empty() ? h_ + group * k_ * block_ : values_.data() + starts_[group] * block_;
    }
    int64_t most() const {
      int64_t found = starts_.empty() ? k_ : 1;
      for (size_t i = 1; i < starts_.size(); i++) found = std::max(found, starts_[i] - starts_[i - 1]);
      return found;
    }

   private:
    const float* h_;
    const int32_t* blocks_;
    int64_t k_, block_;
    std::vector<int64_t> starts_;
    std::vector<int32_t> numbers_;
    std::vector<float> values_;
  };

  int64_t block = 1;
  int64_t at_most = 0;  // blocks may be -1
  Inputs inputs;
  Resident resident;

  const char* read(const ort::Runtime& runtime, const ort::KernelInfo* info) {
    runtime.attribute(info, "block", &block);
    runtime.attribute(info, "at_most", &at_most);
    inputs.take(runtime, info, 4);
    resident.take(runtime, info, 2, &PackedKernels::down, block);
    return nullptr;
  }

  const char* compute(const ort::Runtime& runtime, ort::KernelContext* context) const {
    const Tensor h = inputs.read(runtime, context, 0), blocks = inputs.read(runtime, context, 1);
    const Tensor weight = resident.of(inputs.read(runtime, context, 2)), scale = inputs.read(runtime, context, 3);
    if (h.type != ort::Type::float32 || h.rank < 1 || h.rank > Tensor::kMostDims) return "SparseDown: h is not float32 [..., neurons]";
    if (weight.rank != 2) return "SparseDown: weights are not a matrix [neurons, width]";
    const int64_t tokens = h.rows(), count = h.last();
    const int64_t width = weight.last() * (weight.type == ort::Type::uint8 ? 2 : 1);
    Weights down;
    if (const char* error = read_weights(weight, scale, width, &down)) return error;
    resident.add_packed(&down);
    if (const char* error = check_blocks(blocks, tokens, down.rows, block, at_most != 0)) return error;
    if (count != blocks.last() * block) return "SparseDown: h has another number of neurons than blocks";

    int64_t shape[Tensor::kMostDims];
    std::copy_n(h.dims, h.rank, shape);
    shape[h.rank - 1] = width;
    auto* y = write_output<float>(runtime, context, 0, shape, h.rank);
    if (tokens == 0) return nullptr;

    const int64_t groups = blocks.dims[0] == 1 ? 1 : tokens, each = tokens / groups;
    if ((down.packed != nullptr || ((groups > 1 || tokens >= kSome) && block >= kRowsTogether)) &&
        by_block(runtime, context, h.floats(), blocks, down, tokens, y))
      return nullptr;
    const Used used(h.floats(), blocks, groups, each == 1, block);
    const int64_t parts = std::min<int64_t>(task_count(bytes_of(down.format, used.most() * block * width)), kMostParts);
    if (groups == 1 && parts > 1 && parts * tokens * width <= kMostPartial) {
      const int64_t k = used.count(0);
      const float* from = used.h(0);
      add_up(runtime, context, parts, tokens * width, y, [&](int64_t part, float* to) {
        const int64_t begin = bound(k, parts, part, 1), end = bound(k, parts, part + 1, 1);
        const Chosen chosen{used.blocks(0) + begin, block};
        kernels().sum(down, chosen, (end - begin) * block, from + begin * block, count, tokens, 0, width, to);
      });
      return nullptr;
    }
    const int64_t strips = std::min(parts, (width + kStrip - 1) / kStrip);
    auto task = [&](int64_t i) {
      const int64_t group = i / strips, strip = i % strips;
      const int64_t first = bound(width, strips, strip, kStrip), last = bound(width, strips, strip + 1, kStrip);
      if (first == last) return;
      float* to = y + group * each * width;
      kernels().sum(down, {used.blocks(group), block}, used.count(group) * block, used.h(group), count, each, first, last,
                    to);
    };
    parallel(runtime, context, groups * strips, task);
    return nullptr;
  }

 private:
  // Each part sums some of the neurons, whole rows, which memory delivers at its best: use(part, its sums). Then they are
  // added up; y: `size` of them.
  template <typename Use>
  static void add_up(const ort::Runtime& runtime, ort::KernelContext* context, int64_t parts, int64_t size, float* y,
                     const Use& use) {
    const std::unique_ptr<float[]> others(new float[(parts - 1) * size]);
    auto sum = [&](int64_t part) { use(part, part == 0 ? y : others.get() + (part - 1) * size); };
    parallel(runtime, context, parts, sum);
    const int64_t slices = std::min(parts, (size + kSlice - 1) / kSlice);
    auto add = [&](int64_t slice) {
      const int64_t begin = bound(size, slices, slice, kSlice), end = bound(size, slices, slice + 1, kSlice);
      for (int64_t part = 1; part < parts; part++) {
        const float* from = others.get() + (part - 1) * size;
        for (int64_t i = begin; i < end; i++) y[i] += from[i];
      }
    };
    parallel(runtime, context, slices, add);
  }

  // Each block is read once for all tokens that take it and have something in it. False: some choice has a block twice, which
  // kernels of weights that are not packed sum token by token alone.
  bool by_block(const ort::Runtime& runtime, ort::KernelContext* context, const float* h, const Tensor& blocks,
                const Weights& down, int64_t tokens, float* y) const {
    const int64_t k = blocks.last(), count = k * block, width = down.width;
    const int64_t stride = blocks.dims[0] == 1 ? 0 : k;
    std::vector<ByBlock> turned;
    int64_t together = 0;  // tokens of a block
    for (int64_t first = 0; first < tokens; first += kTogether) {
      const auto nothing = [&](int64_t t, int64_t place) {
        const float* from = h + (first + t) * count + place * block;
        return std::all_of(from, from + block, [](float value) { return value == 0; });
      };
      turned.emplace_back(blocks.ints() + first * stride, stride, std::min(kTogether, tokens - first), k, down.rows / block, nothing);
      together = std::max(together, turned.back().together());
      if (down.packed == nullptr && turned.back().repeats()) return false;
    }
    const PackedKernels* const packed = down.packed != nullptr ? packed_kernels(down.format) : nullptr;
    const int64_t limbs = limbs_of(together);
    const bool some = together >= (is_integer(down.format) ? kMany : kSome);
    const int64_t parts = std::min<int64_t>(task_count(bytes_of(down.format, down.rows * width)), kMostParts);
    const int64_t partial = parts * tokens;  // rows of partial sums
    const bool adds = parts > 1 && tokens <= kTogether && partial * width <= kMostPartialBlocks && partial * kPartialRows <= down.rows;

    const int64_t chunks = (block + kChunk - 1) / kChunk;
    std::vector<std::unique_ptr<BlockBytes[]>> rounded;
    const auto round = [&](int64_t batch, int64_t share, int64_t shares) {
      const int64_t pairs = turned[batch].pairs(), first = bound(pairs, shares, share, 1), last = bound(pairs, shares, share + 1, 1);
      packed->prepare_blocks(down, turned[batch].takers(block), h + batch * kTogether * count, count, limbs, first, last, rounded[batch].get());
    };
    if (packed != nullptr && packed->prepare_blocks != nullptr) {
      for (const ByBlock& one : turned) rounded.emplace_back(new BlockBytes[one.pairs() * limbs * chunks]);
      const int64_t shares = std::clamp<int64_t>(std::min(tokens, kTogether) * count / kRounded, 1, parts);
      auto task = [&](int64_t i) { round(i / shares, i % shares, shares); };
      parallel(runtime, context, static_cast<int64_t>(turned.size()) * shares, task);
    }
    const auto sum = [&](const Takers& takers, int64_t batch, int64_t mine, int64_t first, int64_t last, float* to) {
      const float* from = h + batch * kTogether * count;
      if (packed == nullptr) return kernels().sum_by_block(down, takers, from, count, mine, some, first, last, to);
      packed->sum_by_block(down, takers, from, count, rounded.empty() ? nullptr : rounded[batch].get(), limbs, mine, first, last, to);
    };
    if (adds) {
      const Takers all = turned[0].takers(block);
      add_up(runtime, context, parts, tokens * width, y, [&](int64_t part, float* to) {
        const int64_t begin = bound(all.count, parts, part, 1), end = bound(all.count, parts, part + 1, 1);
        sum({block, end - begin, all.blocks + begin, all.starts + begin, all.tokens, all.places}, 0, tokens, 0, width, to);
      });
      return true;
    }
    const int64_t strips = std::min(parts, (width + kStrip - 1) / kStrip);
    auto task = [&](int64_t i) {
      const int64_t token = i / strips * kTogether, strip = i % strips;
      const int64_t first = bound(width, strips, strip, kStrip), last = bound(width, strips, strip + 1, kStrip);
      if (first == last) return;
      sum(turned[i / strips].takers(block), i / strips, std::min(kTogether, tokens - token), first, last, y + token * width);
    };
    parallel(runtime, context, static_cast<int64_t>(turned.size()) * strips, task);
    return true;
  }
};

inline const Registered<SparseDown> kSparseDown;

}  // namespace trimtab
