// Memory of a thread that lasts from call to call: what one call of a kernel needs, and no other one at the same time.
#pragma once

#include <cstdint>
#include <vector>

namespace trimtab {

// Of at least `bytes`, from the start of a line of the cache on; what was there before may be gone.
inline char* scratch(int64_t bytes) {
  constexpr int64_t kLine = 64;
  thread_local std::vector<char> memory;
  if (static_cast<int64_t>(memory.size()) < bytes + kLine) memory.resize(bytes + kLine);
  return memory.data() + (kLine - reinterpret_cast<uintptr_t>(memory.data()) % kLine) % kLine;
}

}  // namespace trimtab
