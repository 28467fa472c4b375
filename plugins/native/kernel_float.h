// Weights in floating point: products and sums in float32.
#pragma once

#include "kernel_rows.h"

namespace trimtab {
namespace {

constexpr int kFloatRows = 4;  // taken together: as many streams for the hardware to prefetch

// `vector` widens V weights that begin at element i of a row, `one` a single one.
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

template <Format F>
struct FloatKernel {
  static constexpr int kDotRows = kFloatRows, kDotRowsApart = kFloatRows, kSumRows = kFloatRows;

  // out[t][r] = x[t] . row[r], for T tokens.
  template <int T, int R, bool kApart>
  static void dot(const Rows<R>& now, const Rows<R>& next, int64_t width, const Activations& x, float out[T][R]) {
    constexpr int64_t kStep = 2 * V;
    ask_beginnings(next, 0);
    const int64_t stride = x.step * width;
    vf a[T][R] = {}, b[T][R] = {};
    int64_t i = 0;
    for (; i + kStep <= width; i += kStep) {
      TRIMTAB_UNROLL for (int r = 0; r < R; r++) {
        const vf w0 = As<F>::vector(now.row[r].data, i), w1 = As<F>::vector(now.row[r].data, i + V);
        TRIMTAB_UNROLL for (int t = 0; t < T; t++) {
          a[t][r] += w0 * load<vf>(x.floats + t * stride + i);
          b[t][r] += w1 * load<vf>(x.floats + t * stride + i + V);
        }
      }
    }
    TRIMTAB_UNROLL for (int t = 0; t < T; t++)
      TRIMTAB_UNROLL for (int r = 0; r < R; r++) {
        out[t][r] = total(a[t][r] + b[t][r]);
        for (int64_t j = i; j < width; j++) out[t][r] += As<F>::one(now.row[r].data, j) * x.floats[t * stride + j];
      }
  }

  // y[j] += sum over r of h[r] * row[r][first + j], for j in [0, size); a cache line of each row at a time.
  template <bool kApart>
  static void sum(const Rows<4>& now, const Rows<4>& next, const float* h, int64_t first, int64_t size, float* y) {
    constexpr int64_t kLine = 64 / bytes_of(F, 1);
    const float h0 = h[0], h1 = h[1], h2 = h[2], h3 = h[3];
    const char *row0 = now.row[0].data, *row1 = now.row[1].data, *row2 = now.row[2].data, *row3 = now.row[3].data;
    ask_beginnings(next, bytes_of(F, first));
    int64_t j = 0;
    for (; j + kLine <= size; j += kLine) {
      TRIMTAB_UNROLL for (int64_t v = j; v < j + kLine; v += V) {
        vf even = h0 * As<F>::vector(row0, first + v) + load<vf>(y + v), odd = h1 * As<F>::vector(row1, first + v);
        even += h2 * As<F>::vector(row2, first + v);
        odd += h3 * As<F>::vector(row3, first + v);
        store(y + v, even + odd);
      }
    }
    for (; j < size; j++)
      for (int r = 0; r < kSumRows; r++) y[j] += h[r] * As<F>::one(now.row[r].data, first + j);
  }

  static void order(float*, int64_t) {}
};

}  // namespace
}  // namespace trimtab
