// The choices of tokens the other way round: of each block the tokens that take it. So its weights are read once for all of
// these, and what they make of it is one small product.
#pragma once

#include <vector>

#include "kernels.h"

namespace trimtab {

constexpr int64_t kTogether = 96;  // tokens that are turned round at a time: as many as have their activations in a cache

constexpr int64_t kRowsTogether = 8;  // rows that kernels take at a time: smaller blocks are better read token by token

class ByBlock {
 public:
  // `chosen`: [tokens, k], -1 where there is none; `all`: blocks that there are. Pairs of a token and a place for which
  // skip(token, place) holds are left out.
  template <typename Skip>
  ByBlock(const int32_t* chosen, int64_t tokens, int64_t k, int64_t all, const Skip& skip) {
    std::vector<int32_t> counts(all + 1, 0);
    const auto each = [&](const auto& use) {
      for (int64_t t = 0; t < tokens; t++)
        for (int64_t place = 0; place < k && chosen[t * k + place] >= 0; place++)
          if (!skip(t, place)) use(chosen[t * k + place], t, place);
    };
    each([&](int32_t block, int64_t, int64_t) { counts[block + 1]++; });
    starts_.push_back(0);
    for (int64_t b = 0; b < all; b++) {
      if (counts[b + 1] != 0) {
        blocks_.push_back(static_cast<int32_t>(b));
        starts_.push_back(starts_.back() + counts[b + 1]);
      }
      counts[b + 1] += counts[b];
    }
    tokens_.resize(counts[all]);
    places_.resize(counts[all]);
    each([&](int32_t block, int64_t t, int64_t place) {
      const int32_t at = counts[block]++;
      tokens_[at] = static_cast<int32_t>(t);
      places_[at] = static_cast<int32_t>(place);
    });
  }

  Takers takers(int64_t block_size) const {
    return {block_size, static_cast<int64_t>(blocks_.size()), blocks_.data(), starts_.data(), tokens_.data(), places_.data()};
  }

  // Whether most blocks have so many tokens that arithmetic takes the time.
  bool many() const { return static_cast<int64_t>(tokens_.size()) >= kMany * static_cast<int64_t>(blocks_.size()); }

 private:
  std::vector<int32_t> blocks_, tokens_, places_;
  std::vector<int64_t> starts_;
};

}  // namespace trimtab
