// Products of some tokens with some rows in float32: as many sums as there are registers for.
#pragma once

#include "chunk.h"
#include "kernel_float.h"

namespace trimtab {
namespace {

constexpr int kSumVectors = V == 16 ? 4 : 2;  // of a tile of `sum`
constexpr int64_t kSumWide = kSumVectors * V;

// out[t][r] = sum over i < size of x[t][i] * rows[r][i]. Of `next`, `lines` are asked for with every V places.
template <Format F, int T>
void dot_tile(const char* const* rows, const float* const* x, int64_t size, float (*out)[kDotRows], Lines& next,
              int64_t lines) {
  vf sums[T][kDotRows] = {};
  int64_t i = 0;
  for (; i + V <= size; i += V) {
    next.ask(lines);
    vf a[T];
    TRIMTAB_UNROLL for (int t = 0; t < T; t++) a[t] = load<vf>(x[t] + i);
    TRIMTAB_UNROLL for (int r = 0; r < kDotRows; r++) {
      const vf w = As<F>::vector(rows[r], i);
      TRIMTAB_UNROLL for (int t = 0; t < T; t++) sums[t][r] += w * a[t];
    }
  }
  TRIMTAB_UNROLL for (int t = 0; t < T; t++) {
    const vf sum = totals(sums[t][0], sums[t][1], sums[t][2], sums[t][3]);
    std::memcpy(out[t], &sum, sizeof out[t]);
    for (int64_t j = i; j < size; j++)
      for (int r = 0; r < kDotRows; r++) out[t][r] += As<F>::one(rows[r], j) * x[t][j];
  }
}

// y[t][j] += sum over i < count of h[t][i] * rows[i][column + j], for j < kSumWide. Of `next`, `lines` are asked for with
// every row.
template <Format F, int T>
void sum_tile(const char* const* rows, int64_t column, int64_t count, const float* const* h, float* const* y, Lines& next,
              int64_t lines) {
  vf sums[T][kSumVectors];
  TRIMTAB_UNROLL for (int t = 0; t < T; t++)
    TRIMTAB_UNROLL for (int v = 0; v < kSumVectors; v++) sums[t][v] = load<vf>(y[t] + v * V);
  for (int64_t i = 0; i < count; i++) {
    next.ask(lines);
    vf w[kSumVectors];
    TRIMTAB_UNROLL for (int v = 0; v < kSumVectors; v++) w[v] = As<F>::vector(rows[i], column + v * V);
    TRIMTAB_UNROLL for (int t = 0; t < T; t++) {
      const float by = h[t][i];
      TRIMTAB_UNROLL for (int v = 0; v < kSumVectors; v++) sums[t][v] += by * w[v];
    }
  }
  TRIMTAB_UNROLL for (int t = 0; t < T; t++)
    TRIMTAB_UNROLL for (int v = 0; v < kSumVectors; v++) store(y[t] + v * V, sums[t][v]);
}

}  // namespace
}  // namespace trimtab
