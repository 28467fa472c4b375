// What the sparse ops that read weights have in common: their weights as tensors, their tasks, their checks.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <thread>
#include <vector>

#include "custom_op.h"
#include "kernels.h"

namespace trimtab {

constexpr int64_t kTaskBytes = 1 << 16;  // of weights that are worth a task of their own
constexpr int64_t kMostTasks = 16;

// Some for each processor, so that one that is late does not keep the others waiting; each begins with a wait for memory.
inline int64_t task_count(int64_t bytes) {
  static const int64_t processors = std::max(1u, std::thread::hardware_concurrency());
  return std::clamp<int64_t>(bytes / kTaskBytes, 1, std::min(kMostTasks, 2 * processors));
}

// Bounds of part `i` of `parts` of [0, total), at multiples of `unit`.
inline int64_t bound(int64_t total, int64_t parts, int64_t i, int64_t unit) {
  const int64_t units = (total + unit - 1) / unit;
  return std::min(total, units * i / parts * unit);
}

// Whether `values`, if there are any, are one of float32 for each of `rows`.
inline bool one_for_each(const Tensor& values, int64_t rows) {
  return !values || (values.type == ort::Type::float32 && values.rank > 0 && values.rows() * values.last() == rows);
}

// The weights that two inputs are; nullptr, or what is wrong with them.
inline const char* read_weights(const Tensor& w, const Tensor& scale, int64_t width, Weights* out) {
  if (w.rank != 2) return "weights are not a matrix [neurons, width]";
  *out = {Format::float32, w.data, scale.floats(), w.dims[0], w.dims[1]};
  switch (w.type) {
    case ort::Type::float32: out->format = Format::float32; break;
    case ort::Type::float16: out->format = Format::float16; break;
    case ort::Type::bfloat16: out->format = Format::bfloat16; break;
    case ort::Type::int8: out->format = Format::int8; break;
    case ort::Type::uint8: out->format = Format::int4, out->width *= 2; break;
    default: return "weights are of a type that this op does not take";
  }
  if (out->width != width) return "weights and activations have different widths";
  const bool integer = is_integer(out->format);
  if (integer != static_cast<bool>(scale)) return "integer weights need scales, others take none";
  if (!integer) return nullptr;
  if (out->format == Format::int4 && width % kInt4Block != 0) return "the width of int4 weights is no multiple of 32";
  const int64_t scales = out->format == Format::int8 ? out->rows : out->rows * (width / kInt4Block);
  if (!one_for_each(scale, scales))
    return "scales are not float32 [neurons] (int8) or [neurons, width / 32] (int4)";
  return nullptr;
}

// How many blocks a choice of at most k has: those in front of the first -1.
inline int64_t chosen_of(const int32_t* blocks, int64_t k) { return std::find(blocks, blocks + k, -1) - blocks; }

// Blocks [1 or tokens, k] of int32, each within [0, rows / size); or of each choice the first ones, and -1 behind.
inline const char* check_blocks(const Tensor& blocks, int64_t tokens, int64_t rows, int64_t size, bool at_most) {
  if (blocks.type != ort::Type::int32 || blocks.rank != 2) return "blocks are not int32 [tokens or 1, k]";
  if (blocks.dims[0] != 1 && blocks.dims[0] != tokens) return "blocks are for another number of tokens";
  if (size < 1 || rows % size != 0) return "the block size does not divide the number of neurons";
  const int32_t* found = blocks.ints();
  for (int64_t i = 0; i < blocks.dims[0]; i++, found += blocks.dims[1])
    for (int64_t j = 0, end = at_most ? chosen_of(found, blocks.dims[1]) : blocks.dims[1]; j < blocks.dims[1]; j++)
      if (j < end ? found[j] < 0 || found[j] >= rows / size : found[j] != -1) return "a block lies outside the weights";
  return nullptr;
}

// Bytes of an activation that is multiplied with packed weights: one where several tokens take the same rows, since then it is
// not memory alone that is waited for.
inline int64_t limbs_of(int64_t together) { return together >= kSome ? 1 : 2; }

// x as the kernels take it for weights of a format.
class Prepared {
 public:
  // `together`: how many tokens take the same rows.
  Prepared(const float* x, int64_t tokens, int64_t together, const Weights& w) {
    const Kernels& use = kernels();
    const int64_t width = w.width;
    const Format format = w.format;
    if (w.packed != nullptr) {
      const PackedKernels& packed = *packed_kernels(format);
      view_.limbs = limbs_of(together), view_.row_bytes = packed.row_bytes(width, view_.limbs);
      bytes_.reset(new char[tokens * view_.row_bytes]);
      for (int64_t t = 0; t < tokens; t++) packed.prepare(x + t * width, width, view_.limbs, bytes_.get() + t * view_.row_bytes);
      view_.bytes = bytes_.get(), dot_ = packed.dot;
      return;
    }
    if (!is_integer(format) || together >= kMany) {
      view_.floats = x;
      return;
    }
    const int64_t groups = groups_of(width), blocks = groups * (kGroup / kInt4Block);
    integers_.reset(new int16_t[tokens * groups * kGroup]);
    scale_.reset(new float[tokens * (groups + blocks)]);
    float* less = scale_.get() + tokens * groups;
    for (int64_t t = 0; t < tokens; t++)
      use.prepare(format, x + t * width, width, integers_.get() + t * groups * kGroup, scale_.get() + t * groups,
                  less + t * blocks);
    view_.integers = integers_.get(), view_.scale = scale_.get(), view_.less = less;
  }

  const Activations& view() const { return view_; }

  // The kernel that multiplies them.
  auto dot() const { return dot_; }

 private:
  std::unique_ptr<int16_t[]> integers_;
  std::unique_ptr<char[]> bytes_;
  std::unique_ptr<float[]> scale_;
  Activations view_;
  decltype(Kernels::dot) dot_ = kernels().dot;
};

}  // namespace trimtab
