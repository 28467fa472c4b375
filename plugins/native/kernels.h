// The inner loops of the sparse ops, compiled once per instruction set and chosen when the library is loaded.
#pragma once

#include <cstddef>
#include <cstdint>

#include "activation.h"
#include "weights.h"

namespace trimtab {

// Rows of a weight matrix: blocks of `size` neighbours each.
struct Chosen {
  const int32_t* blocks;
  int64_t size;

  int64_t row(int64_t i) const { return size == 1 ? blocks[i] : blocks[i / size] * size + i % size; }
};

constexpr int64_t kGroup = 512;  // of x that share a scale where it is multiplied in integers

constexpr int64_t kStrip = 256;  // places worth a task of their own

constexpr int64_t kMany = 8;  // tokens with the same rows from which on arithmetic takes the time, and not memory

constexpr int64_t groups_of(int64_t width) { return (width + kGroup - 1) / kGroup; }

// x [tokens, width]: as floats for weights in floating point and for many tokens; for integer weights else as 16-bit integers, whose products with
// them are exact, with a scale for every kGroup of a row. Their order is that of the kernels, see `prepare`; a row is filled
// up with zeros to whole groups.
struct Activations {
  const float* floats = nullptr;
  const int16_t* integers = nullptr;  // [tokens, groups_of(width) * kGroup]
  const float* scale = nullptr;       // [tokens, groups_of(width)]
  const float* less = nullptr;        // int4: what the zero point takes off, of each block
  int64_t step = 1;                   // tokens from one that is taken to the next

  Activations from(int64_t token, int64_t width) const {
    if (integers == nullptr) return {floats + token * width, nullptr, nullptr, nullptr, step};
    const int64_t group = token * groups_of(width);
    return {nullptr, integers + group * kGroup, scale + group, less + group * (kGroup / kInt4Block), step};
  }

  // From place i on, the first of a block of int4.
  Activations at(int64_t i) const { return {nullptr, integers + i, scale, less + i / kInt4Block, step}; }
};

// Of each block the tokens that take it: those from starts[i] to starts[i + 1], with the places that it has in their choices.
struct Takers {
  int64_t size;   // rows of a block
  int64_t count;  // of blocks that anyone takes
  const int32_t* blocks;
  const int64_t* starts;
  const int32_t *tokens, *places;
};

struct Kernels {
  const char* name;

  // out[t, i - begin] = x[numbers[t]] . W[chosen.row(i)] for i in [begin, end) and `tokens` rows of x, the first ones where
  // there are no `numbers`; they ascend. out has `out_stride` floats from token to token. If `after` is given, its rows are
  // wanted next.
  void (*dot)(const Weights& w, const Chosen& chosen, int64_t begin, int64_t end, const Activations& x, int64_t tokens,
              float* out, int64_t out_stride, const Weights* after, const int32_t* numbers);

  // y[t, first..last) = sum over i in [0, count) of h[t, i] * W[chosen.row(i), first..last).
  // h has `h_stride` floats from token to token, y has w.width. `first` is a multiple of kStrip.
  void (*sum)(const Weights& w, const Chosen& chosen, int64_t count, const float* h, int64_t h_stride, int64_t tokens,
              int64_t first, int64_t last, float* y);

  // y[t, first..last) = sum over the blocks that t takes, of h[t, place * size + i] * W[block * size + i, first..last).
  // `many`: products in float32, whatever the weights. `first` is a multiple of kStrip.
  void (*sum_by_block)(const Weights& w, const Takers& takers, const float* h, int64_t h_stride, int64_t tokens, bool many,
                       int64_t first, int64_t last, float* y);

  // h = act(h), or act(gate) * h where there is a gate, `count` of each.
  void (*finish)(Activation kind, float* h, const float* gate, int64_t count);

  // A row of x, for integer weights.
  void (*prepare)(Format format, const float* x, int64_t width, int16_t* integers, float* scale, float* less);
};

extern const Kernels kPortable;
#if defined(TRIMTAB_X86)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// Those of the best instruction set, see isa.h.
const Kernels& kernels();

}  // namespace trimtab
