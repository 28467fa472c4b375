// A weight matrix of Int8Linear, packed once; nodes that share the matrix share the pack.
#pragma once

#include <map>
#include <memory>
#include <mutex>

#include "../native/resident.h"
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

  // Of a constant, the pack that there is while any node of the process uses it.
  static std::shared_ptr<const Packed> of(const Tensor& weight) {
    static std::mutex mutex;
    static std::map<const void*, std::weak_ptr<const Packed>> packs;
    const std::lock_guard<std::mutex> lock(mutex);
    std::weak_ptr<const Packed>& known = packs[weight.data];
    std::shared_ptr<const Packed> pack = known.lock();
    if (pack == nullptr || pack->view_.in_features != weight.dims[0] || pack->view_.out_features != weight.dims[1]) {
      pack = std::make_shared<const Packed>(static_cast<const int8_t*>(weight.data), weight.dims[0], weight.dims[1],
                                            int8_kernels());
      known = pack;
      const size_t size = static_cast<size_t>(weight.dims[0] * weight.dims[1]);
      if (size >= kWorthCopying) give_back(weight.data, size);
    }
    return pack;
  }

 private:
  Memory memory_;
  PackedWeight view_;
};

}  // namespace trimtab
