// The choices of tokens the other way round: of each block the tokens that take it. So its weights are read once for all of
// these, and what they make of it is one small product.
#pragma once

#include <vector>

#include "kernels.h"

namespace trimtab {

constexpr int64_t kRowsTogether = 8;  // rows that kernels take at a time: smaller blocks are better read token by token

class ByBlock {
 public:
  // `chosen`: [tokens, k], or [k] with a `stride` of 0, -1 where there is none; `all`: blocks that there are. Pairs of a token
  // and a place for which skip(token, place) holds are left out.
  template <typename Skip>
  ByBlock(const int32_t* chosen, int64_t stride, int64_t tokens, int64_t k, int64_t all, const Skip& skip) {
    if (tokens == 1) {  // nothing to turn round
      starts_.push_back(0);
      for (int64_t place = 0; place < k && chosen[place] >= 0; place++) {
        if (skip(0, place)) continue;
        blocks_.push_back(chosen[place]), places_.push_back(static_cast<int32_t>(place));
        starts_.push_back(static_cast<int64_t>(blocks_.size()));
      }
      tokens_.assign(blocks_.size(), 0);
      return;
    }
    struct Pair {
      int32_t block, token, place;
    };
    std::vector<Pair> pairs;
    pairs.reserve(tokens * k);
    std::vector<int32_t> counts(all + 1, 0), last(all, -1);
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t place = 0; place < k && chosen[t * stride + place] >= 0; place++) {
        if (skip(t, place)) continue;
        pairs.push_back({chosen[t * stride + place], static_cast<int32_t>(t), static_cast<int32_t>(place)});
        const Pair& pair = pairs.back();
        counts[pair.block + 1]++;
        repeats_ |= last[pair.block] == pair.token;
        last[pair.block] = pair.token;
      }
    starts_.push_back(0);
    for (int64_t b = 0; b < all; b++) {
      if (counts[b + 1] != 0) {
        blocks_.push_back(static_cast<int32_t>(b));
        starts_.push_back(starts_.back() + counts[b + 1]);
      }
      counts[b + 1] += counts[b];
    }
    tokens_.resize(pairs.size());
    places_.resize(pairs.size());
    for (const Pair& pair : pairs) {
      const int32_t at = counts[pair.block]++;
      tokens_[at] = pair.token, places_[at] = pair.place;
    }
  }

  Takers takers(int64_t block_size) const {
    return {block_size, static_cast<int64_t>(blocks_.size()), blocks_.data(), starts_.data(), tokens_.data(), places_.data()};
  }

  // Whether one of several tokens has a block twice: tiles of several tokens, each with sums of its own, cannot hold it.
  bool repeats() const { return repeats_; }

  int64_t pairs() const { return static_cast<int64_t>(tokens_.size()); }

  // How many tokens a block has on average, of those that have any; rounded up.
  int64_t together() const {
    const int64_t blocks = static_cast<int64_t>(blocks_.size());
    return blocks == 0 ? 0 : (pairs() + blocks - 1) / blocks;
  }

 private:
  std::vector<int32_t> blocks_, tokens_, places_;
  std::vector<int64_t> starts_;
  bool repeats_ = false;
};

}  // namespace trimtab
