// A weight matrix of Int4Linear, packed once.
#pragma once

#include <memory>

#include "../native/custom_op.h"
#include "../native/large_memory.h"
#include "../native/shared_packs.h"
#include "kernels.h"

namespace trimtab {

class PackedBlocks {
 public:
  // `weight` [out_features, in_features / 2] and `scale` [out_features, in_features / 32], which have been checked.
  PackedBlocks(const Tensor& weight, const Tensor& scale, const Int4Kernels& use) : scale_(scale.data) {
    view_.in_features = 2 * weight.dims[1], view_.out_features = weight.dims[0];
    view_.half = scale.type == ort::Type::bfloat16;
    use.measure(&view_);
    memory_ = large_memory((view_.out_features + use.panel - 1) / use.panel * view_.panel_bytes);
    if (memory_ == nullptr) return;
    use.pack({static_cast<const uint8_t*>(weight.data), scale.data}, view_, static_cast<char*>(memory_.get()));
    view_.panels = static_cast<const char*>(memory_.get());
  }

  const PackedInt4& view() const { return view_; }

  // Of constants.
  static std::shared_ptr<const PackedBlocks> of(const Tensor& weight, const Tensor& scale) {
    const auto fits = [&](const PackedBlocks& pack) {
      return pack.scale_ == scale.data && pack.view_.out_features == weight.dims[0] && pack.view_.in_features == 2 * weight.dims[1];
    };
    return shared_pack<PackedBlocks>(weight.data, fits, [&] {
      auto pack = std::make_shared<const PackedBlocks>(weight, scale, int4_kernels());
      for (const Tensor* tensor : {&weight, &scale}) {
        const size_t size = static_cast<size_t>(tensor->rows() * tensor->last()) * tensor->element_bytes();
        if (size >= kWorthCopying) give_back(tensor->data, size);
      }
      return pack;
    });
  }

 private:
  Memory memory_;
  PackedInt4 view_;
  const void* scale_;
};

}  // namespace trimtab
