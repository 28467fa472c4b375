// The places of the highest of some scores.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

namespace trimtab {

// Places of the `take` highest of `count` scores, plus `offset`, ascending; of equal ones the first.
inline void highest(const float* scores, int64_t offset, int64_t count, int64_t take, int32_t* out) {
  thread_local std::vector<float> sorted;
  sorted.assign(scores, scores + count);
  std::nth_element(sorted.begin(), sorted.begin() + take - 1, sorted.end(), std::greater<>());
  const float cut = sorted[take - 1];
  int64_t above = 0;
  for (int64_t i = 0; i < take - 1; i++) above += sorted[i] > cut;
  int64_t equal = take - above;
  for (int64_t i = 0; i < count; i++)
    if (scores[i] > cut || (scores[i] == cut && equal-- > 0)) *out++ = static_cast<int32_t>(offset + i);
}

}  // namespace trimtab
