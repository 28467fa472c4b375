// A constant weight of a sparse op, copied once into memory of large pages, and there packed as kernels want it.
#pragma once

#include "large_memory.h"
#include "rows.h"

namespace trimtab {

class Resident {
 public:
  using Packed = Packing PackedKernels::*;  // one of those

  // Takes the constant input `index` of a node, if it is one: packed together with its scales, the input behind it, where these are
  // integers of blocks that the processor's kernels pack; else as it is where it is large.
  void take(const ort::Runtime& runtime, const ort::KernelInfo* info, size_t index, Packed packed = nullptr, int64_t block = 1) {
    const Tensor tensor = tensor_of(runtime, runtime.constant_input(info, index));
    if (!tensor) return;
    source_ = tensor.data;
    const size_t size = static_cast<size_t>(tensor.rows() * tensor.last()) * tensor.element_bytes();
    if (packed != nullptr && pack(tensor, tensor_of(runtime, runtime.constant_input(info, index + 1)), packed, block)) {
      if (size >= kWorthCopying) give_back(source_, size);
    } else if (kCopies && size >= kWorthCopying && std::getenv("TRIMTAB_SMALL_PAGES") == nullptr) {
      if ((copy_ = large_memory(size)) == nullptr) return;
      std::memcpy(copy_.get(), source_, size);
      give_back(source_, size);
    }
  }

  // The copy of `tensor`, where it is the constant that was taken as it is.
  Tensor of(Tensor tensor) const {
    if (copy_ != nullptr && tensor.data == source_ && packed_.packed == nullptr) tensor.data = copy_.get();
    return tensor;
  }

  // Adds to weights that were read what is packed of them, if anything.
  void add_packed(Weights* w) const {
    if (packed_.packed == nullptr || w->data != packed_.data || w->scale != packed_.scale) return;
    w->packed = packed_.packed, w->packed_block = packed_.packed_block, w->short_scales = packed_.short_scales;
  }

 private:
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  static constexpr bool kCopies = true;
#else
  static constexpr bool kCopies = false;
#endif

  bool pack(const Tensor& weight, const Tensor& scale, Packed packed, int64_t block) {
    Weights w;
    if (!scale || weight.rank != 2) return false;
    const int64_t width = weight.last() * (weight.type == ort::Type::uint8 ? 2 : 1);
    if (read_weights(weight, scale, width, &w) != nullptr || packed_kernels(w.format) == nullptr) return false;
    if (w.rows == 0 || block <= 0 || block % kPackedBlock != 0 || w.rows % block != 0 || w.width % kPackedWidth != 0) return false;
    const Packing& use = packed_kernels(w.format)->*packed;
    w.short_scales = w.format == Format::int4 && all_short(w.scale, scale.rows() * scale.last());
    w.packed_block = use.block_bytes(w, block);
    if ((copy_ = large_memory(w.rows / block * w.packed_block)) == nullptr) return false;
    use.pack(w, block, static_cast<char*>(copy_.get()));
    w.packed = static_cast<const char*>(copy_.get());
    packed_ = w;
    return true;
  }

  // Whether floats are bfloat16 all the same.
  static bool all_short(const float* values, int64_t count) {
    uint32_t lost = 0;
    for (int64_t i = 0; i < count; i++) {
      uint32_t bits;
      std::memcpy(&bits, values + i, sizeof bits);
      lost |= bits & 0xffff;
    }
    return lost == 0;
  }

  Memory copy_;
  const void* source_ = nullptr;
  Weights packed_;
};

}  // namespace trimtab
