// Products of tokens with a packed block, tile by tile, while memory is asked for.
#pragma once

#include "chunk.h"
#include "stream.h"

namespace trimtab {
namespace {

// Calls use(t, some, r, ahead, lines) for tiles of at most `most` tokens with each panel of `panel` rows of a block: tokens t to
// t + some, rows r to r + panel; for each `step` bytes that it reads, it asks `ahead` for `lines`.
template <typename Use>
void each_tile(const Weights& w, const Chosen& chosen, int64_t begin, int64_t tokens, int64_t most, int64_t panel, int64_t step,
               const Wanted& next, const Use& use) {
  const int64_t passes = (tokens + most - 1) / most;
  const bool evenly = passes > 1 || w.packed_block <= kShort, more = next.weights != nullptr;
  const int64_t lines = evenly ? lines_in(step, passes) : 0;
  Stream ahead(passes > 1 ? kPassesAhead : evenly ? kAhead : kBeginning, false, w.block(chosen.block(begin)),
               evenly ? w.packed_block : 0, more ? next.weights->block(next.chosen.block(next.begin)) : nullptr,
               more ? next.weights->packed_block : 0);
  for (int64_t r = 0; r < chosen.size; r += panel) {
    if (!evenly && r + panel >= chosen.size) ahead.ask(lines_in(kBeginning, 1));
    in_tiles(tokens, most, [&](int64_t t, int64_t some) { use(t, some, r, ahead, lines); });
  }
}

}  // namespace
}  // namespace trimtab
