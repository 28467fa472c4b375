// Attention of packed tokens: softmax(scale q k' + bias) v, block by block of keys, so that no matrix of scores leaves the caches.
//
// A tile is kTileRows queries by kTileVectors vectors: of keys in the first product, of a head's dimensions in the second. Keys
// are transposed into panels first, so that both products read one vector per multiply-add of kTileRows registers. A softmax
// over several blocks keeps its maximum and its sum, and scales down what it has summed when the maximum grows (online softmax,
// arXiv 1805.02867). Included by one source file per instruction set, for which TRIMTAB_ATTEND is the name.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>

#include "../native/kernel_rows.h"
#include "../native/vector_math.h"
#include "attend.h"

namespace trimtab {
namespace {

constexpr int kTileRows = 6;
constexpr int64_t kRow = kKeyBlock + 16;  // from row to row of scores, so that their places in the cache differ
constexpr int kTileVectors = V == 16 ? 4 : 2;  // with kTileRows: sums, operands and a factor are all in registers

constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline constexpr int64_t whole_vectors(int64_t count) { return (count + V - 1) / V * V; }

// Memory of a thread, kept from call to call. It grows to what the widest head needs.
class AttentionScratch {
 public:
  // `dim` of a head; `rows` that are kept between blocks of keys.
  AttentionScratch(int64_t dim, int64_t rows) {
    const int64_t wide = whole_vectors(dim);
    float* at = memory(dim * kKeyBlock + kKeyBlock * wide + kTileRows * (kRow + wide) + rows * (wide + 2) + 4 * kLine);
    keys = take(at, dim * kKeyBlock);
    values = take(at, kKeyBlock * wide);
    weights = take(at, kTileRows * kRow);
    queries = take(at, kTileRows * wide);
    sums = take(at, rows * wide);
    most = take(at, rows);
    total = at;
  }

  float *keys;     // panels of kTileVectors vectors of keys: [dim][keys of the panel]
  float *values;   // [keys][wide]
  float *weights;  // [kTileRows][kRow]: scores, then e^scores
  float *queries;  // [kTileRows][wide], scaled
  float *sums;     // [rows][wide]: e^scores times values
  float *most, *total;  // [rows]: largest score, and sum of e^(score - most)

 private:
  static constexpr int64_t kLine = 16;  // floats of a cache line

  static float* take(float*& at, int64_t count) {
    float* taken = at;
    at += (count + kLine - 1) / kLine * kLine;
    return taken;
  }

  static float* memory(int64_t floats) {
    struct Free {
      void operator()(float* p) const { std::free(p); }
    };
    static thread_local std::unique_ptr<float, Free> kept;
    static thread_local int64_t size = 0;
    if (floats > size) {
      const int64_t bytes = (4 * floats + 63) / 64 * 64;
      kept.reset();
      kept.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
      size = floats;
    }
    return kept.get();
  }
};

// Transposes keys [begin, begin + count) into panels; places behind them are zeros.
inline void pack_keys(const AttentionPart& part, int64_t begin, int64_t count, float* out) {
  constexpr int64_t kPanel = kTileVectors * V;
  const int64_t padded = whole_vectors(count);
  for (int64_t first = 0; first < padded; first += V) {
    const int64_t panel = first / kPanel * kPanel, width = std::min(kPanel, padded - panel);
    const float* from = part.k + (begin + first) * part.k_stride;
    float* to = out + panel * part.dim + first - panel;
    for (int64_t d = 0; d < part.dim; d += V) {
      const int64_t dims = std::min<int64_t>(V, part.dim - d);
      vf rows[V];
      if (first + V <= count && dims == V) {
        TRIMTAB_UNROLL_ALL for (int i = 0; i < V; i++) rows[i] = load<vf>(from + i * part.k_stride + d);
      } else {
        for (int i = 0; i < V; i++)
          rows[i] = first + i >= count ? vf{} : dims == V ? load<vf>(from + i * part.k_stride + d)
                                                          : load_some(from + i * part.k_stride + d, dims);
      }
      transpose(rows);
      if (dims == V) {
        TRIMTAB_UNROLL_ALL for (int i = 0; i < V; i++) store(to + (d + i) * width, rows[i]);
      } else {
        for (int64_t i = 0; i < dims; i++) store(to + (d + i) * width, rows[i]);
      }
    }
  }
}

// `count` rows of `dim` floats times `scale`, filled up with zeros to `wide`.
inline void pack_row(const float* from, int64_t dim, float scale, float* out) {
  int64_t d = 0;
  for (; d + V <= dim; d += V) store(out + d, load<vf>(from + d) * scale);
  if (d < dim) store(out + d, load_some(from + d, dim - d) * scale);
}

// Asks for `count` rows, which lie too far apart for the hardware to foresee.
inline void ask_rows(const float* from, int64_t stride, int64_t dim, int64_t count) {
  for (int64_t i = 0; i < count; i++, from += stride)
    for (int64_t d = 0; d < dim; d += 16) __builtin_prefetch(from + d);
}

// Where the rows of a tile are. There are always kTileRows, the last one again where there are fewer.
struct TileRows {
  const float* query[kTileRows];
  const float* bias[kTileRows];
  float* context[kTileRows];

  TileRows(const AttentionPart& part, int64_t first) {
    int64_t head = first / part.tokens, token = first % part.tokens;
    for (int r = 0; r < kTileRows; r++) {
      query[r] = part.q + token * part.q_stride + head * part.dim;
      bias[r] = part.bias == nullptr ? nullptr : part.bias + head * part.bias_head + token * part.bias_stride;
      context[r] = part.context + token * part.context_stride + head * part.dim;
      if (first + r + 1 >= part.last) continue;
      token++;
      if (token == part.tokens) head++, token = 0;
    }
  }
};

// out[r][j] = q[r] . keys[.., j] (+ bias[r][j]) for R rows and a panel of N vectors; -inf behind its first `count` keys.
template <int R, int N>
void score_tile(const float* q, int64_t wide, int64_t dim, const float* panel, int64_t count, const float* const* bias,
                int64_t key, float* out, vf most[kTileRows]) {
  vf sums[R][N] = {};
  for (int64_t d = 0; d < dim; d++, panel += N * V) {
    vf k[N];
    TRIMTAB_UNROLL for (int n = 0; n < N; n++) k[n] = load<vf>(panel + n * V);
    TRIMTAB_UNROLL for (int r = 0; r < R; r++) {
      const float by = q[r * wide + d];
      TRIMTAB_UNROLL for (int n = 0; n < N; n++) sums[r][n] += by * k[n];
    }
  }
  const int64_t rest = count - (N - 1) * V;  // keys of the last vector
  if (bias != nullptr) {
    TRIMTAB_UNROLL for (int r = 0; r < R; r++) {
      TRIMTAB_UNROLL for (int n = 0; n < N; n++) {
        const float* from = bias[r] + key + n * V;
        sums[r][n] += n < N - 1 || rest == V ? load<vf>(from) : load_some(from, rest);
      }
    }
  }
  if (rest < V) {
    vi lane;
    for (int i = 0; i < V; i++) lane[i] = i;
    const vi real = lane < static_cast<int32_t>(rest);
    TRIMTAB_UNROLL for (int r = 0; r < R; r++) sums[r][N - 1] = real ? sums[r][N - 1] : all(-kInfinity);
  }
  TRIMTAB_UNROLL for (int r = 0; r < R; r++)
    TRIMTAB_UNROLL for (int n = 0; n < N; n++) {
      store(out + r * kRow + n * V, sums[r][n]);
      most[r] = larger(most[r], sums[r][n]);
    }
}

// sums[r] = sums[r] * decay[r] + weights[r] values, for R rows and N vectors of dimensions; times factor[r] and to `context`,
// where that is given, and else to `out`.
template <int R, int N>
void value_tile(const float* weights, int64_t count, const float* values, int64_t wide, const float* decay, float* out,
                const float* factor, float* const* context, int64_t first) {
  vf sums[R][N];
  TRIMTAB_UNROLL for (int r = 0; r < R; r++)
    TRIMTAB_UNROLL for (int n = 0; n < N; n++)
      sums[r][n] = decay == nullptr ? vf{} : load<vf>(out + r * wide + n * V) * decay[r];
  for (int64_t i = 0; i < count; i++, values += wide) {
    vf v[N];
    TRIMTAB_UNROLL for (int n = 0; n < N; n++) v[n] = load<vf>(values + n * V);
    TRIMTAB_UNROLL for (int r = 0; r < R; r++) {
      const float by = weights[r * kRow + i];
      TRIMTAB_UNROLL for (int n = 0; n < N; n++) sums[r][n] += by * v[n];
    }
  }
  TRIMTAB_UNROLL for (int r = 0; r < R; r++) {
    float* to = factor == nullptr ? out + r * wide : context[r] + first;
    const float by = factor == nullptr ? 1.0f : factor[r];
    TRIMTAB_UNROLL for (int n = 0; n < N; n++) store(to + n * V, sums[r][n] * by);
  }
}

// The tile of n vectors.
template <typename Tile>
inline void by_vectors(int64_t n, const Tile& tile) {
  static_assert(kTileVectors == 4 || kTileVectors == 2);
  if constexpr (kTileVectors == 4) {
    if (n == 4) return tile(Number<4>());
    if (n == 3) return tile(Number<3>());
  }
  if (n == 2) return tile(Number<2>());
  return tile(Number<1>());
}

// Scores of a tile against a block of keys, into scratch.weights, and the largest of each row.
inline void scores(const AttentionPart& part, const TileRows& rows, int64_t key, int64_t count,
                   const AttentionScratch& scratch, vf most[kTileRows]) {
  constexpr int64_t kPanel = kTileVectors * V;
  const int64_t wide = whole_vectors(part.dim);
  for (int r = 0; r < kTileRows; r++) {
    pack_row(rows.query[r], part.dim, part.scale, scratch.queries + r * wide);
    most[r] = all(-kInfinity);
  }
  for (int64_t at = 0; at < count; at += kPanel) {
    const int64_t some = std::min(kPanel, count - at);
    by_vectors((some + V - 1) / V, [&](auto n) {
      score_tile<kTileRows, decltype(n)::value>(scratch.queries, wide, part.dim, scratch.keys + at * part.dim, some,
                                                part.bias == nullptr ? nullptr : rows.bias, key + at,
                                                scratch.weights + at, most);
    });
  }
  for (int r = 0; r < kTileRows; r++) most[r] = across(most[r], larger);
}

// scratch.weights = e^(weights - most), and `sums` of each row. Rows without a finite score have no weights.
inline void exponentials(int64_t count, const vf most[kTileRows], float* weights, vf sums[kTileRows]) {
  vf base[kTileRows], sum[kTileRows] = {};
  TRIMTAB_UNROLL for (int r = 0; r < kTileRows; r++) base[r] = most[r] == -kInfinity ? vf{} : most[r];
  for (int64_t i = 0; i < count; i += V) {
    TRIMTAB_UNROLL for (int r = 0; r < kTileRows; r++) {
      const vf e = exp_of_negative(load<vf>(weights + r * kRow + i) - base[r]);
      store(weights + r * kRow + i, e);
      sum[r] += e;
    }
  }
  TRIMTAB_UNROLL for (int r = 0; r < kTileRows; r++) sums[r] = across(sum[r], [](vf a, vf b) { return a + b; });
}

// received[i] += weights[r][i] * factor[r], for the first `rows` rows.
inline void add_received(const float* weights, const float* factor, int64_t rows, int64_t count, float* received) {
  for (int64_t i = 0; i < count; i += V) {
    vf sum = {};
    for (int64_t r = 0; r < rows; r++) sum += load<vf>(weights + r * kRow + i) * factor[r];
    if (i + V <= count) {
      store(received + i, load<vf>(received + i) + sum);
    } else {
      for (int64_t j = i; j < count; j++) received[j] += sum[j - i];
    }
  }
}

}  // namespace

void TRIMTAB_ATTEND(const AttentionPart& part) {
  const int64_t wide = whole_vectors(part.dim), rows = part.last - part.first;
  const int64_t blocks = (part.tokens + kKeyBlock - 1) / kKeyBlock;
  const int64_t each = whole_vectors((part.tokens + blocks - 1) / blocks);  // keys of a block
  const AttentionScratch scratch(part.dim, rows + kTileRows);
  if (part.received != nullptr) std::fill_n(part.received, part.tokens, 0.0f);
  for (int64_t key = 0; key < part.tokens; key += each) {
    const int64_t count = std::min(each, part.tokens - key);
    ask_rows(part.v + key * part.v_stride, part.v_stride, part.dim, count);
    pack_keys(part, key, count, scratch.keys);
    for (int64_t i = 0; i < count; i++)
      pack_row(part.v + (key + i) * part.v_stride, part.dim, 1.0f, scratch.values + i * wide);
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const TileRows tile(part, part.first + row);
      ask_rows(tile.query[kTileRows - 1] + part.q_stride, part.q_stride, part.dim, kTileRows);
      float *most = scratch.most + row, *total = scratch.total + row, *sums = scratch.sums + row * wide;
      vf largest[kTileRows], sum[kTileRows];
      float decay[kTileRows];
      scores(part, tile, key, count, scratch, largest);
      if (key > 0) {
        for (int r = 0; r < kTileRows; r++) {
          const vf before = all(most[r]);
          largest[r] = larger(largest[r], before);
          decay[r] = before[0] == -kInfinity ? 0.0f : exp_of_negative(before - largest[r])[0];
        }
      }
      exponentials(count, largest, scratch.weights, sum);
      for (int r = 0; r < kTileRows; r++) {
        most[r] = largest[r][0];
        total[r] = key > 0 ? total[r] * decay[r] + sum[r][0] : sum[r][0];
      }
      float factor[kTileRows];
      for (int r = 0; r < kTileRows; r++) factor[r] = 1 / total[r];
      const bool done = key + count == part.tokens, whole = wide == part.dim;
      for (int64_t d = 0; d < wide; d += kTileVectors * V)
        by_vectors(std::min<int64_t>(kTileVectors, (wide - d) / V), [&](auto n) {
          value_tile<kTileRows, decltype(n)::value>(scratch.weights, count, scratch.values + d, wide,
                                                    key > 0 ? decay : nullptr, sums + d,
                                                    done && whole ? factor : nullptr, tile.context, d);
        });
      const int64_t real = std::min<int64_t>(kTileRows, rows - row);
      if (part.received != nullptr && blocks == 1) add_received(scratch.weights, factor, real, count, part.received);
      if (!done || whole) continue;
      for (int64_t r = 0; r < real; r++) {
        int64_t d = 0;
        for (; d + V <= part.dim; d += V) store(tile.context[r] + d, load<vf>(sums + r * wide + d) * factor[r]);
        for (; d < part.dim; d++) tile.context[r][d] = sums[r * wide + d] * factor[r];
      }
    }
  }
  if (part.received == nullptr || blocks == 1) return;
  // Weights are known once the last key is; so all scores are computed once more.
  for (int64_t key = 0; key < part.tokens; key += each) {
    const int64_t count = std::min(each, part.tokens - key);
    pack_keys(part, key, count, scratch.keys);
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const TileRows tile(part, part.first + row);
      const int64_t real = std::min<int64_t>(kTileRows, rows - row);
      vf largest[kTileRows], sum[kTileRows];
      float factor[kTileRows];
      scores(part, tile, key, count, scratch, largest);
      for (int r = 0; r < kTileRows; r++) {
        largest[r] = all(scratch.most[row + r]);
        factor[r] = 1 / scratch.total[row + r];
      }
      exponentials(count, largest, scratch.weights, sum);
      add_received(scratch.weights, factor, real, count, part.received + key);
    }
  }
}

}  // namespace trimtab
