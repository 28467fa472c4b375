// The places of the highest of some scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

namespace trimtab {

// The `take` highest of `count` scores, in no order: the last of `out` is the least of them.
//
// Of many, those are looked at closely that share the least one's first bits: a histogram of the bits that order floats is
// three times as fast as sorting in parts.
inline void highest_values(const float* scores, int64_t count, int64_t take, std::vector<float>* out) {
  constexpr int64_t kClosely = 1 << 12;
  constexpr int kBins = 1 << 11, kShift = 32 - 11;
  const auto bin_of = [](float score) {
    uint32_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    return (bits & 0x80000000u ? ~bits : bits | 0x80000000u) >> kShift;  // ascending as the scores do
  };
  out->clear();
  if (count < kClosely) {
    out->assign(scores, scores + count);
  } else {
    thread_local std::vector<uint32_t> bins;
    bins.assign(kBins, 0);
    for (int64_t i = 0; i < count; i++) bins[bin_of(scores[i])]++;
    uint32_t least = kBins - 1;
    for (int64_t above = 0; above + bins[least] < take; least--) above += bins[least];
    for (int64_t i = 0; i < count; i++)
      if (bin_of(scores[i]) >= least) out->push_back(scores[i]);
  }
  std::nth_element(out->begin(), out->begin() + take - 1, out->end(), std::greater<>());
  out->resize(take);
}

// Places of the `take` highest of `count` scores, plus `offset`, ascending; of equal ones the first.
inline void highest(const float* scores, int64_t offset, int64_t count, int64_t take, int32_t* out) {
  thread_local std::vector<float> best, numbers;
  if (std::any_of(scores, scores + count, [](float score) { return score != score; })) {  // no number is the least of all
    numbers.assign(scores, scores + count);
    std::replace_if(numbers.begin(), numbers.end(), [](float score) { return score != score; }, -INFINITY);
    scores = numbers.data();
  }
  highest_values(scores, count, take, &best);
  const float cut = best[take - 1];
  int64_t above = 0;
  for (int64_t i = 0; i < take - 1; i++) above += best[i] > cut;
  int64_t equal = take - above;
  for (int64_t i = 0; i < count; i++)
    if (scores[i] > cut || (scores[i] == cut && equal-- > 0)) *out++ = static_cast<int32_t>(offset + i);
}

}  // namespace trimtab
