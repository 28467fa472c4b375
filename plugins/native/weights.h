// Weight matrices of the sparse ops: one row per neuron, so that a block of neurons is one contiguous read.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trimtab {

enum class Format : int32_t { float32, float16, bfloat16, int8, int4 };

constexpr int64_t kInt4Block = 32;  // inputs that share a scale

constexpr bool is_integer(Format format) { return format == Format::int8 || format == Format::int4; }

constexpr int64_t bytes_of(Format format, int64_t weights) {
  switch (format) {
    case Format::float32: return 4 * weights;
    case Format::int8: return weights;
    case Format::int4: return weights / 2;
    default: return 2 * weights;
  }
}

// W [rows, width].
struct Weights {
  Format format = Format::float32;
  const void* data = nullptr;   // int4: two to a byte, the first in the low half, as unsigned with zero point 8
  const float* scale = nullptr; // int8: [rows]; int4: [rows, width / 32]; else none
  int64_t rows = 0;
  int64_t width = 0;

  // Integers of blocks with their scales, in place of both: see PackedKernels.
  const char* packed = nullptr;
  int64_t packed_block = 0;  // bytes of a block
  bool short_scales = false;  // these are bfloat16, in int4

  const char* block(int64_t number) const { return packed + number * packed_block; }
};

}  // namespace trimtab
