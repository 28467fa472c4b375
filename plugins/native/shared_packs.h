// What kernels made of constants; nodes that share a constant share it.
#pragma once

#include <map>
#include <memory>
#include <mutex>

namespace trimtab {

// Of the constant at `data`: the pack that some node of the process uses, if `fits` says that it serves; else one that `make`
// makes now.
template <typename Pack, typename Fits, typename Make>
std::shared_ptr<const Pack> shared_pack(const void* data, const Fits& fits, const Make& make) {
  static std::mutex mutex;
  static std::map<const void*, std::weak_ptr<const Pack>> packs;
  const std::lock_guard<std::mutex> lock(mutex);
  std::weak_ptr<const Pack>& known = packs[data];
  std::shared_ptr<const Pack> pack = known.lock();
  if (pack == nullptr || !fits(*pack)) known = pack = make();
  return pack;
}

}  // namespace trimtab
