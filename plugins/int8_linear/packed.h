// A weight matrix of Int8Linear, packed once.
#pragma once

#include <memory>

#include "../native/custom_op.h"
#include "../native/large_memory.h"
#include "../native/shared_packs.h"
#include "kernels.h"

namespace trimtab {

class Packed {
 public:
  Packed(const int8_t* w, int64_t in_features, int64_t out_features, const Int8Kernels& use) {
    const int64_t panels = (out_features + use.panel - 1) / use.panel;
    view_.in_features = in_features, view_.out_features = out_features;
    const int64_t bytes = panels * use.panel * view_.quads() * 4;
    memory_ = large_memory(bytes + panels * use.panel * static_cast<int64_t>(sizeof(int32_t)));
    if (memory_ == nullptr) return;
    auto* to = static_cast<int8_t*>(memory_.get());
    auto* sums = reinterpret_cast<int32_t*>(to + bytes);
    use.pack(w, in_features, out_features, to, sums);
    view_.panels = to, view_.sums = sums;
  }

  const PackedWeight& view() const { return view_; }

  // Of a constant.
  static std::shared_ptr<const Packed> of(const Tensor& weight) {
    const int64_t in_features = weight.dims[0], out_features = weight.dims[1];
    const auto fits = [&](const Packed& pack) {
      return pack.view_.in_features == in_features && pack.view_.out_features == out_features;
    };
    return shared_pack<Packed>(weight.data, fits, [&] {
      auto pack = std::make_shared<const Packed>(static_cast<const int8_t*>(weight.data), in_features, out_features, int8_kernels());
      const size_t size = static_cast<size_t>(in_features * out_features);
      if (size >= kWorthCopying) give_back(weight.data, size);
      return pack;
    });
  }

 private:
  Memory memory_;
  PackedWeight view_;
};

}  // namespace trimtab
