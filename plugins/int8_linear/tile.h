// Products of M rows with N panels: sums of four products at a time, all of which stay in registers.
#pragma once

#include <array>
#include <utility>

#include "quantize.h"

namespace trimtab {
namespace {

#if TRIMTAB_WIDTH == 16
constexpr int kTileRows = 12, kFewRows = 4;
#elif defined(TRIMTAB_VNNI)
constexpr int kTileRows = 6, kFewRows = 2;
#else
constexpr int kTileRows = 4, kFewRows = 1;
#endif
constexpr int kTilePanels = 2, kFewPanels = 4;  // few rows have few sums: more panels keep the multipliers busy
static_assert(kFewRows * kFewPanels <= kTileRows * kTilePanels);

// Four inputs: of V outputs' weights, and of a row of x, as they are multiplied.
#if defined(TRIMTAB_VNNI)
struct Weights4 {
  vi bytes;
  void read(const int8_t* from) { bytes = load<vi>(from); }
};

struct Inputs4 {
  vi bytes;
  explicit Inputs4(const char* from) : bytes(vi{} + load<int32_t>(from)) {}
};

inline void multiply(const Inputs4& x, const Weights4& w, vi& sum) {
#if TRIMTAB_WIDTH == 16
  sum = (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x.bytes, (__m512i)w.bytes);
#else
  sum = (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x.bytes, (__m256i)w.bytes);
#endif
}
#else
struct Weights4 {
  vs even, odd;
  void read(const int8_t* from) {
    const vs both = load<vs>(from);
    even = (vs)((vw)both << 8) >> 8;
    odd = both >> 8;
  }
};

struct Inputs4 {
  vs even, odd;
  explicit Inputs4(const char* from) : even((vs)(vi{} + load<int32_t>(from))), odd((vs)(vi{} + load<int32_t>(from + 4))) {}
};

inline void multiply(const Inputs4& x, const Weights4& w, vi& sum) {
  sum += multiply_pairs(x.even, w.even);
  sum += multiply_pairs(x.odd, w.odd);
}
#endif

// sums[m][n * V + j] = sum over i of q[m][i] * W[i, j of panel n].
template <int M, int N>
void multiply_tile(const char* integers, int64_t row_bytes, const int8_t* panel, int64_t panel_bytes, int64_t quads,
                   int32_t* sums) {
  // The address of a row is one of these and once or twice row_bytes: twelve pointers would not fit into registers.
  const char* base[(M + 2) / 3];
  TRIMTAB_ALL for (int b = 0; b < (M + 2) / 3; b++) base[b] = integers + 3 * b * row_bytes;
  vi sum[M][N] = {};
  for (int64_t k = 0; k < quads; k++) {
    // Row by row: with all rows of x loaded first, sums would have to leave the registers.
    Weights4 w[N];
    TRIMTAB_ALL for (int n = 0; n < N; n++) w[n].read(panel + n * panel_bytes);
    TRIMTAB_ALL for (int m = 0; m < M; m++) {
      const Inputs4 x(base[m / 3] + m % 3 * row_bytes);
      TRIMTAB_ALL for (int n = 0; n < N; n++) multiply(x, w[n], sum[m][n]);
    }
    panel += 4 * V;
    TRIMTAB_ALL for (int b = 0; b < (M + 2) / 3; b++) base[b] += 4 * sizeof(Integer);
  }
  TRIMTAB_ALL for (int m = 0; m < M; m++)
    TRIMTAB_ALL for (int n = 0; n < N; n++) std::memcpy(sums + (m * N + n) * V, &sum[m][n], sizeof(vi));
}

using MultiplyTile = void (*)(const char*, int64_t, const int8_t*, int64_t, int64_t, int32_t*);

template <int N, int... M>
constexpr std::array<MultiplyTile, sizeof...(M)> tiles_of(std::integer_sequence<int, M...>) {
  return {multiply_tile<M + 1, N>...};
}

// For `rows` rows and N panels.
template <int N, int kMostRows>
MultiplyTile tile_of(int64_t rows) {
  static constexpr auto tiles = tiles_of<N>(std::make_integer_sequence<int, kMostRows>());
  return tiles[rows - 1];
}

inline MultiplyTile tile_of(int64_t rows, int64_t panels) {
  switch (panels) {
    case 1: return tile_of<1, kTileRows>(rows);
    case 2: return tile_of<2, kTileRows>(rows);
    case 3: return tile_of<3, kFewRows>(rows);
    default: return tile_of<4, kFewRows>(rows);
  }
}

}  // namespace
}  // namespace trimtab
