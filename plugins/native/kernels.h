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

  int64_t block(int64_t row) const { return blocks[row / size]; }
  int64_t row(int64_t i) const { return size == 1 ? blocks[i] : blocks[i / size] * size + i % size; }
};

constexpr int64_t kGroup = 512;  // of x that share a scale where it is multiplied in integers

constexpr int64_t kStrip = 256;  // places worth a task of their own

constexpr int64_t kSome = 3;  // tokens with the same rows from which on rows are multiplied in tiles
constexpr int64_t kMany = 8;  // from which on integers that are not are widened to floats

constexpr int64_t kTogether = 96;  // tokens that are worked on at a time: as many as have their activations in a cache

constexpr int64_t kChunk = 32;  // rows that are

constexpr int64_t groups_of(int64_t width) { return (width + kGroup - 1) / kGroup; }

constexpr int64_t kPackedBlock = 8, kPackedWidth = 16;  // what blocks and widths of packed weights are multiples of

constexpr int64_t kLine = 64;  // bytes of a line of the cache

constexpr int64_t whole_lines(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

// x [tokens, width]: as floats for weights in floating point. For integer weights as 16-bit integers, whose products with them
// are exact, with a scale for every kGroup of a row; in the order that the kernels want, see `prepare`, and filled up with
// zeros to whole groups. For packed weights as bytes, see PackedKernels. Where many tokens take the same rows, as floats.
struct Activations {
  const float* floats = nullptr;
  const int16_t* integers = nullptr;  // [tokens, groups_of(width) * kGroup]
  const char* bytes = nullptr;        // [tokens, row_bytes], as PackedKernels write them
  const float* scale = nullptr;       // [tokens, groups_of(width)]
  const float* less = nullptr;        // int4: what the zero point takes off, of each block
  int64_t row_bytes = 0;
  int64_t limbs = 1;                  // bytes of an activation
  int64_t step = 1;                   // tokens from one that is taken to the next

  Activations from(int64_t token, int64_t width) const {
    Activations later = *this;
    if (floats != nullptr) later.floats += token * width;
    if (integers != nullptr) {
      const int64_t group = token * groups_of(width);
      later.integers += group * kGroup, later.scale += group, later.less += group * (kGroup / kInt4Block);
    }
    if (bytes != nullptr) later.bytes += token * row_bytes;
    return later;
  }

  // 16-bit integers from place i on, the first of a block of int4.
  Activations at(int64_t i) const {
    Activations later = *this;
    later.integers += i, later.less += i / kInt4Block;
    return later;
  }
};

// Rows of other weights, or of other blocks, that are wanted next; none without weights.
struct Wanted {
  const Weights* weights = nullptr;
  Chosen chosen{nullptr, 1};
  int64_t begin = 0, end = 0;
};

// Of each block the tokens that take it: those from starts[i] to starts[i + 1], with the places that it has in their choices.
struct Takers {
  int64_t size;   // rows of a block
  int64_t count;  // of blocks that anyone takes
  const int32_t* blocks;
  const int64_t* starts;
  const int32_t *tokens, *places;
};

// What a token has in up to kChunk rows of a block: h times the rows' scales, as bytes.
struct BlockBytes {
  int8_t values[kChunk];  // zeros at the end
  int32_t sum;            // of them, 128 times
  float scale;
};

// How weights of a kind are packed: w, of which `packed_block` and `short_scales` are unknown as yet, in blocks.
struct Packing {
  int64_t (*block_bytes)(const Weights& w, int64_t block);
  void (*pack)(const Weights& w, int64_t block, char* to);
};

// Weights of int8 or int4, of blocks that are packed in the order in which they are multiplied: the scales of a block, filled up
// to whole lines of the cache, and behind them its integers; so a block is one contiguous read as before. Activations have one or
// two bytes. Blocks are multiples of kPackedBlock, the width of kPackedWidth.
struct PackedKernels {
  Packing up, down;  // w [rows, width] as SparseUp and SparseDown multiply it

  // A row of x as bytes.
  int64_t (*row_bytes)(int64_t width, int64_t limbs);
  void (*prepare)(const float* x, int64_t width, int64_t limbs, char* row);

  // h of pairs first to last of a token and a block: [pairs, limbs, ceil(size / kChunk)]. nullptr: the sums round h themselves.
  void (*prepare_blocks)(const Weights& w, const Takers& takers, const float* h, int64_t h_stride, int64_t limbs,
                         int64_t first, int64_t last, BlockBytes* bytes);

  // As those of Kernels, `dot` of the one whole block that begins at `begin`; `bytes`: of all pairs, where they are rounded before.
  void (*dot)(const Weights& w, const Chosen& chosen, int64_t begin, int64_t end, const Activations& x, int64_t tokens,
              float* out, int64_t out_stride, const Wanted& next, const int32_t* numbers);
  void (*sum_by_block)(const Weights& w, const Takers& takers, const float* h, int64_t h_stride, const BlockBytes* bytes,
                       int64_t limbs, int64_t tokens, int64_t first, int64_t last, float* y);
};

struct Kernels {
  const char* name;

  // out[t, i - begin] = x[numbers[t]] . W[chosen.row(i)] for i in [begin, end) and `tokens` rows of x, the first ones where
  // there are no `numbers`; they ascend. out has `out_stride` floats from token to token.
  void (*dot)(const Weights& w, const Chosen& chosen, int64_t begin, int64_t end, const Activations& x, int64_t tokens,
              float* out, int64_t out_stride, const Wanted& next, const int32_t* numbers);

  // y[t, first..last) = sum over i in [0, count) of h[t, i] * W[chosen.row(i), first..last).
  // h has `h_stride` floats from token to token, y has w.width. `first` is a multiple of kStrip.
  void (*sum)(const Weights& w, const Chosen& chosen, int64_t count, const float* h, int64_t h_stride, int64_t tokens,
              int64_t first, int64_t last, float* y);

  // y[t, first..last) = sum over the blocks that t takes, of h[t, place * size + i] * W[block * size + i, first..last).
  // `some`: most blocks have several tokens. `first` is a multiple of kStrip.
  void (*sum_by_block)(const Weights& w, const Takers& takers, const float* h, int64_t h_stride, int64_t tokens, bool some,
                       int64_t first, int64_t last, float* y);

  // h = act(h), or act(gate) * h where there is a gate, `count` of each.
  void (*finish)(Activation kind, float* h, const float* gate, int64_t count);

  // A row of x, for integer weights.
  void (*prepare)(Format format, const float* x, int64_t width, int16_t* integers, float* scale, float* less);
  const PackedKernels* packed;  // of int8, and of int4; nullptr: this processor does not multiply bytes
};

extern const Kernels kPortable;
#if defined(TRIMTAB_X86)
extern const Kernels kAvx2, kAvx512;
extern const PackedKernels kPackedAvx2[2], kPackedAvx512[2], kPackedAvx512Vnni[2];
#if defined(TRIMTAB_AVX_VNNI)
extern const PackedKernels kPackedAvxVnni[2];
#endif
#endif

// Those of the best instruction set, see isa.h.
const Kernels& kernels();

// Those of packed weights of a format; nullptr where it is never packed.
inline const PackedKernels* packed_kernels(Format format) {
  const PackedKernels* all = kernels().packed;
  return all == nullptr || !is_integer(format) ? nullptr : all + (format == Format::int4);
}

}  // namespace trimtab
