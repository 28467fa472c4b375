// The kernels, in vectors of TRIMTAB_WIDTH floats. Included by one source file per instruction set; the compiler's vector
// extensions make each what its flags allow, so there is one text for all of them.
//
// A decoding step is bound by memory: each weight is read once. So rows are taken four at a time, which are as many streams
// for the hardware to prefetch, and the same places of the next four, which it cannot foresee, are asked for meanwhile. Rows
// of int8 are short, and where they are neighbours, one after the other is read faster (measured on Zen 3).
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "vectors.h"

namespace trimtab {
namespace {

// Loops over rows and tokens of a tile are unrolled early, so that their sums are registers and not an array in memory.
#define TRIMTAB_UNROLL _Pragma("GCC unroll 8")

constexpr int kRows = 4;         // taken together
constexpr int64_t kTile = 2048;  // outputs of `sum` that stay in the first cache

struct Row {
  const char* data;
  const float* scale;  // int8: one; int4: one per block
};

struct Four {
  Row row[kRows];
};

inline Row row_at(const Weights& w, int64_t row) {
  const int64_t scales = w.format == Format::int4 ? w.width / kInt4Block : 1;
  return {static_cast<const char*>(w.data) + row * bytes_of(w.format, w.width),
          w.scale == nullptr ? nullptr : w.scale + row * scales};
}

// The next rows from i on; the last one again where there are no more.
inline Four find(const Weights& w, const Chosen& chosen, int64_t i, int64_t end) {
  Four found;
  TRIMTAB_UNROLL for (int r = 0; r < kRows; r++) found.row[r] = row_at(w, chosen.row(std::min(i + r, end - 1)));
  return found;
}

// Asks for what lies `at` bytes into each of the next rows, once per cache line; `step` bytes are worked on at a time.
// Inlined at once: GCC takes a function that only prefetches for one without effect, and drops its calls.
__attribute__((always_inline)) inline void ask(const Four& next, int64_t at, int64_t step) {
  if (at % 64 >= step) return;
  TRIMTAB_UNROLL for (int r = 0; r < kRows; r++) __builtin_prefetch(next.row[r].data + at, 0, 2);
}

// The same of a single row, of which `step` bytes, at least a line or a part of one, are worked on at a time.
__attribute__((always_inline)) inline void ask_line(const char* next, int64_t at, int64_t step) {
  if (step < 64 && at % 64 >= step) return;
  for (int64_t line = 0; line < step; line += 64) __builtin_prefetch(next + at + line, 0, 3);
}

// Weights in floating point: `vector` widens V of them that begin at element i of a row, `one` a single one.
template <Format>
struct As;

template <>
struct As<Format::float32> {
  static vf vector(const char* row, int64_t i) { return load<vf>(row + 4 * i); }
  static float one(const char* row, int64_t i) { return load<float>(row + 4 * i); }
};

template <>
struct As<Format::float16> {
  static vf vector(const char* row, int64_t i) { return widen_half(row + 2 * i); }
  static float one(const char* row, int64_t i) { return widen_half(load<uint16_t>(row + 2 * i)); }
};

template <>
struct As<Format::bfloat16> {
  static vf vector(const char* row, int64_t i) { return widen_bfloat(row + 2 * i); }
  static float one(const char* row, int64_t i) { return widen_bfloat(load<uint16_t>(row + 2 * i)); }
};

template <>
struct As<Format::int8> {
  static vf vector(const char* row, int64_t i) { return __builtin_convertvector(widen_bytes(row + i, true), vf); }
  static float one(const char* row, int64_t i) { return load<int8_t>(row + i); }
};

// out[t][r] = x[t] . row[r], for T tokens and kRows rows, in floating point.
template <Format F, int T>
void dot_tile(const Four& now, const Four& next, int64_t width, const Activations& x, float out[T][kRows]) {
  constexpr int64_t kStep = 2 * V;
  vf a[T][kRows] = {}, b[T][kRows] = {};
  int64_t i = 0;
  for (; i + kStep <= width; i += kStep) {
    ask(next, bytes_of(F, i), bytes_of(F, kStep));
    TRIMTAB_UNROLL for (int r = 0; r < kRows; r++) {
      const vf w0 = As<F>::vector(now.row[r].data, i), w1 = As<F>::vector(now.row[r].data, i + V);
      TRIMTAB_UNROLL for (int t = 0; t < T; t++) {
        a[t][r] += w0 * load<vf>(x.floats + t * width + i);
        b[t][r] += w1 * load<vf>(x.floats + t * width + i + V);
      }
    }
  }
  TRIMTAB_UNROLL for (int t = 0; t < T; t++)
    TRIMTAB_UNROLL for (int r = 0; r < kRows; r++) {
      out[t][r] = total(a[t][r] + b[t][r]);
      for (int64_t j = i; j < width; j++) out[t][r] += As<F>::one(now.row[r].data, j) * x.floats[t * width + j];
    }
}

// The same of int8 weights: products of integers, exact within a group of x.
template <int T>
void dot_tile_int8(const Four& now, const Four& next, int64_t width, const Activations& x, float out[T][kRows]) {
  constexpr int64_t kStep = 2 * V;
  vf sums[T][kRows] = {};
  float rest[T][kRows] = {};
  for (int64_t group = 0; group * kGroup < width; group++) {
    const int64_t end = std::min(width, (group + 1) * kGroup);
    vi parts[T][kRows] = {};
    int64_t i = group * kGroup;
    for (; i + kStep <= end; i += kStep) {
      ask(next, i, kStep);
      TRIMTAB_UNROLL for (int r = 0; r < kRows; r++) {
        const vs w = widen_bytes_to_shorts(now.row[r].data + i);
        TRIMTAB_UNROLL for (int t = 0; t < T; t++) parts[t][r] += multiply_pairs(w, load<vs>(x.integers + t * width + i));
      }
    }
    TRIMTAB_UNROLL for (int t = 0; t < T; t++) {
      const float scale = x.scale[t * groups_of(width) + group];
      TRIMTAB_UNROLL for (int r = 0; r < kRows; r++) {
        sums[t][r] += __builtin_convertvector(parts[t][r], vf) * scale;
        int32_t tail = 0;
        for (int64_t j = i; j < end; j++) tail += load<int8_t>(now.row[r].data + j) * x.integers[t * width + j];
        rest[t][r] += static_cast<float>(tail) * scale;
      }
    }
  }
  TRIMTAB_UNROLL for (int t = 0; t < T; t++)
    TRIMTAB_UNROLL for (int r = 0; r < kRows; r++) out[t][r] = (total(sums[t][r]) + rest[t][r]) * *now.row[r].scale;
}

// The same of int4 weights, whose scales change with every block. x has the places of each block split.
template <int T>
void dot_tile_int4(const Four& now, const Four& next, int64_t width, const Activations& x, float out[T][kRows]) {
  vf sums[T][kRows] = {};
  for (int64_t group = 0; group * kGroup < width; group++) {
    const int64_t end = std::min(width, (group + 1) * kGroup);
    vf parts[T][kRows] = {};
    for (int64_t i = group * kGroup; i < end; i += kInt4Block) {
      ask(next, i / 2, kInt4Block / 2);
      TRIMTAB_UNROLL for (int r = 0; r < kRows; r++) {
        const Nibbles w(now.row[r].data + i / 2);
        const float scale = now.row[r].scale[i / kInt4Block];
        TRIMTAB_UNROLL for (int t = 0; t < T; t++)
          parts[t][r] += __builtin_convertvector(w.dot(x.integers + t * width + i), vf) * scale;
      }
    }
    TRIMTAB_UNROLL for (int t = 0; t < T; t++)
      TRIMTAB_UNROLL for (int r = 0; r < kRows; r++) sums[t][r] += parts[t][r] * x.scale[t * groups_of(width) + group];
  }
  TRIMTAB_UNROLL for (int t = 0; t < T; t++)
    TRIMTAB_UNROLL for (int r = 0; r < kRows; r++) out[t][r] = total(sums[t][r]);
}

// The same of a single row of int8: out[t] = x[t] . row.
template <int T>
void dot_row_int8(const Row& row, const char* next, int64_t width, const Activations& x, float out[T]) {
  constexpr int64_t kStep = 4 * V;
  vf sums[T] = {};
  float rest[T] = {};
  for (int64_t group = 0; group * kGroup < width; group++) {
    const int64_t end = std::min(width, (group + 1) * kGroup);
    vi even[T] = {}, odd[T] = {};
    int64_t i = group * kGroup;
    for (; i + kStep <= end; i += kStep) {
      ask_line(next, i, kStep);
      const vs w0 = widen_bytes_to_shorts(row.data + i), w1 = widen_bytes_to_shorts(row.data + i + 2 * V);
      TRIMTAB_UNROLL for (int t = 0; t < T; t++) {
        even[t] += multiply_pairs(w0, load<vs>(x.integers + t * width + i));
        odd[t] += multiply_pairs(w1, load<vs>(x.integers + t * width + i + 2 * V));
      }
    }
    TRIMTAB_UNROLL for (int t = 0; t < T; t++) {
      const float scale = x.scale[t * groups_of(width) + group];
      sums[t] += __builtin_convertvector(even[t] + odd[t], vf) * scale;
      int32_t tail = 0;
      for (int64_t j = i; j < end; j++) tail += load<int8_t>(row.data + j) * x.integers[t * width + j];
      rest[t] += static_cast<float>(tail) * scale;
    }
  }
  TRIMTAB_UNROLL for (int t = 0; t < T; t++) out[t] = (total(sums[t]) + rest[t]) * *row.scale;
}

// One row after the other, for T tokens.
template <int T>
void dot_stream_int8(const Weights& w, const Chosen& chosen, int64_t begin, int64_t end, const Activations& x, float* out,
                int64_t out_stride) {
  Row next = row_at(w, chosen.row(begin));
  for (int64_t i = begin; i < end; i++) {
    const Row now = next;
    next = row_at(w, chosen.row(std::min(i + 1, end - 1)));
    float found[T];
    dot_row_int8<T>(now, next.data, w.width, x, found);
    TRIMTAB_UNROLL for (int t = 0; t < T; t++) out[t * out_stride + i - begin] = found[t];
  }
}

template <Format F, int T>
void dot_tokens(const Weights& w, const Chosen& chosen, int64_t begin, int64_t end, const Activations& x, float* out,
                int64_t out_stride) {
  Four next = find(w, chosen, begin, end);
  for (int64_t i = begin; i < end; i += kRows) {
    const Four now = next;
    next = find(w, chosen, std::min(i + kRows, end - 1), end);
    float found[T][kRows];
    if constexpr (F == Format::int8) dot_tile_int8<T>(now, next, w.width, x, found);
    else if constexpr (F == Format::int4) dot_tile_int4<T>(now, next, w.width, x, found);
    else dot_tile<F, T>(now, next, w.width, x, found);
    TRIMTAB_UNROLL for (int t = 0; t < T; t++)
      for (int r = 0; r < kRows && i + r < end; r++) out[t * out_stride + i + r - begin] = found[t][r];
  }
}

template <Format F>
void dot_format(const Weights& w, const Chosen& chosen, int64_t begin, int64_t end, const Activations& x,
                int64_t tokens, float* out, int64_t out_stride) {
  if (F == Format::int8 && tokens == 1 && chosen.size > 1)
    return dot_stream_int8<1>(w, chosen, begin, end, x, out, out_stride);
  int64_t t = 0;
  for (; t + 2 <= tokens; t += 2)
    dot_tokens<F, 2>(w, chosen, begin, end, x.from(t, w.width), out + t * out_stride, out_stride);
  if (t < tokens) dot_tokens<F, 1>(w, chosen, begin, end, x.from(t, w.width), out + t * out_stride, out_stride);
}

// y[j] += sum over r of h[r] * row[r][first + j], for j in [0, size); a cache line of each row at a time.
template <Format F>
void sum_tile(const Four& now, const Four& next, const float* h, int64_t first, int64_t size, float* y) {
  constexpr int64_t kLine = 64 / bytes_of(F, 1);
  const float h0 = h[0], h1 = h[1], h2 = h[2], h3 = h[3];
  const char *row0 = now.row[0].data, *row1 = now.row[1].data, *row2 = now.row[2].data, *row3 = now.row[3].data;
  int64_t j = 0;
  for (; j + kLine <= size; j += kLine) {
    ask(next, bytes_of(F, first + j), 64);
    TRIMTAB_UNROLL for (int64_t v = j; v < j + kLine; v += V) {
      vf even = h0 * As<F>::vector(row0, first + v) + load<vf>(y + v), odd = h1 * As<F>::vector(row1, first + v);
      even += h2 * As<F>::vector(row2, first + v);
      odd += h3 * As<F>::vector(row3, first + v);
      store(y + v, even + odd);
    }
  }
  for (; j < size; j++)
    for (int r = 0; r < kRows; r++) y[j] += h[r] * As<F>::one(now.row[r].data, first + j);
}

// The same of int4 weights; y has the places of each block split. h (q - 8) = h q - 8 h, and the second part is one number.
inline void sum_tile_int4(const Four& now, const Four& next, const float* h, int64_t first, int64_t size, float* y) {
  for (int64_t j = 0; j < size; j += kInt4Block) {
    const int64_t block = (first + j) / kInt4Block;
    ask(next, block * (kInt4Block / 2), kInt4Block / 2);
    float scaled[kRows], less = 0;
    TRIMTAB_UNROLL for (int r = 0; r < kRows; r++) {
      scaled[r] = h[r] * now.row[r].scale[block];
      less -= 8 * scaled[r];
    }
    for (int64_t place = 0; place < kInt4Block; place += V) {
      vf sum = load<vf>(y + j + place) + less;
      TRIMTAB_UNROLL for (int r = 0; r < kRows; r++) {
        const vi bytes = widen_bytes(now.row[r].data + block * 16 + place % 16, false);
        sum += scaled[r] * __builtin_convertvector(place < 16 ? bytes & 15 : bytes >> 4, vf);
      }
      store(y + j + place, sum);
    }
  }
}

template <Format F>
void sum_format(const Weights& w, const Chosen& chosen, int64_t count, const float* h, int64_t h_stride, int64_t tokens,
                int64_t first, int64_t last, float* y) {
  for (int64_t start = first; start < last; start += kTile) {
    const int64_t size = std::min(kTile, last - start);
    for (int64_t t = 0; t < tokens; t++) std::fill_n(y + t * w.width + start, size, 0.0f);
    Four next = {};
    if (count > 0) next = find(w, chosen, 0, count);
    for (int64_t i = 0; i < count; i += kRows) {
      const Four now = next;
      next = find(w, chosen, std::min(i + kRows, count - 1), count);
      for (int64_t t = 0; t < tokens; t++) {
        float factor[kRows];
        TRIMTAB_UNROLL for (int r = 0; r < kRows; r++) {
          factor[r] = i + r < count ? h[t * h_stride + i + r] : 0.0f;
          if (F == Format::int8) factor[r] *= *now.row[r].scale;
        }
        float* to = y + t * w.width + start;
        if constexpr (F == Format::int4) sum_tile_int4(now, next, factor, start, size, to);
        else sum_tile<F>(now, next, factor, start, size, to);
      }
    }
  }
}

void dot(const Weights& w, const Chosen& chosen, int64_t begin, int64_t end, const Activations& x, int64_t tokens,
         float* out, int64_t out_stride) {
  switch (w.format) {
    case Format::float32: return dot_format<Format::float32>(w, chosen, begin, end, x, tokens, out, out_stride);
    case Format::float16: return dot_format<Format::float16>(w, chosen, begin, end, x, tokens, out, out_stride);
    case Format::bfloat16: return dot_format<Format::bfloat16>(w, chosen, begin, end, x, tokens, out, out_stride);
    case Format::int8: return dot_format<Format::int8>(w, chosen, begin, end, x, tokens, out, out_stride);
    case Format::int4: return dot_format<Format::int4>(w, chosen, begin, end, x, tokens, out, out_stride);
  }
}

void sum(const Weights& w, const Chosen& chosen, int64_t count, const float* h, int64_t h_stride, int64_t tokens,
         int64_t first, int64_t last, float* y) {
  switch (w.format) {
    case Format::float32: return sum_format<Format::float32>(w, chosen, count, h, h_stride, tokens, first, last, y);
    case Format::float16: return sum_format<Format::float16>(w, chosen, count, h, h_stride, tokens, first, last, y);
    case Format::bfloat16: return sum_format<Format::bfloat16>(w, chosen, count, h, h_stride, tokens, first, last, y);
    case Format::int8: return sum_format<Format::int8>(w, chosen, count, h, h_stride, tokens, first, last, y);
    case Format::int4: return sum_format<Format::int4>(w, chosen, count, h, h_stride, tokens, first, last, y);
  }
}

}  // namespace

const Kernels TRIMTAB_KERNELS = {TRIMTAB_ISA, dot, sum};

}  // namespace trimtab
