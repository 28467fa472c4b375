// The kernels, in vectors of TRIMTAB_WIDTH floats. Included by one source file per instruction set; the compiler's vector
// extensions make each what its flags allow, so there is one text for all of them.
#include <cmath>
#include <type_traits>

#include "activate.h"
#include "kernel_float.h"
#include "kernel_int4.h"
#include "kernel_int8.h"
#include "kernel_many.h"

namespace trimtab {
namespace {

// What each format is computed by, and whether single rows are chosen, which lie apart.
template <typename Use>
void with(Format format, bool apart, const Use& use) {
  const auto either = [&](auto kernel) { apart ? use(kernel, std::true_type()) : use(kernel, std::false_type()); };
  switch (format) {
    case Format::float32: return either(FloatKernel<Format::float32>());
    case Format::float16: return either(FloatKernel<Format::float16>());
    case Format::bfloat16: return either(FloatKernel<Format::bfloat16>());
    case Format::int8: return either(Int8Kernel());
    case Format::int4: return either(Int4Kernel());
  }
}

// T rows of x at a time, for all of the weights.
template <typename Kernel, int T, bool kApart>
void dot_tokens(const Weights& w, const Chosen& chosen, int64_t begin, int64_t end, const Activations& x, float* out,
                int64_t out_stride, const Wanted& wanted) {
  constexpr int R = kApart ? Kernel::kDotRowsApart : Kernel::kDotRows;
  Rows<R> next = find<R>(w, chosen, begin, end);
  for (int64_t i = begin; i < end; i += R) {
    const Rows<R> now = next;
    next = find_next<R>(w, chosen, i, end, wanted);
    float found[T][R];
    Kernel::template dot<T, R, kApart>(now, next, w.width, x, found);
    TRIMTAB_UNROLL for (int t = 0; t < T; t++)
      for (int r = 0; r < R && i + r < end; r++) out[t * out_stride + i + r - begin] = found[t][r];
  }
}

void dot(const Weights& w, const Chosen& chosen, int64_t begin, int64_t end, const Activations& x, int64_t tokens,
         float* out, int64_t out_stride, const Wanted& next, const int32_t* numbers) {
  if (x.floats != nullptr && (is_integer(w.format) || tokens >= kSome))
    return dot_many(w, chosen, begin, end, x, tokens, out, out_stride, next, numbers);
  with(w.format, chosen.size == 1, [&](auto kernel, auto apart) {
    using Kernel = decltype(kernel);
    constexpr bool kApart = decltype(apart)::value;
    for (int64_t t = 0; t < tokens; t += 2) {
      const bool pair = t + 2 <= tokens;
      Activations mine = x.from(numbers == nullptr ? t : numbers[t], w.width);
      if (pair && numbers != nullptr) mine.step = numbers[t + 1] - numbers[t];
      const auto& use = pair ? dot_tokens<Kernel, 2, kApart> : dot_tokens<Kernel, 1, kApart>;
      use(w, chosen, begin, end, mine, out + t * out_stride, out_stride, next);
    }
  });
}

void sum(const Weights& w, const Chosen& chosen, int64_t count, const float* h, int64_t h_stride, int64_t tokens,
         int64_t first, int64_t last, float* y) {
  if (tokens >= (is_integer(w.format) ? kMany : kSome)) return sum_many(w, chosen, count, h, h_stride, tokens, first, last, y);
  with(w.format, chosen.size == 1, [&](auto kernel, auto apart) {
    using Kernel = decltype(kernel);
    constexpr int R = Kernel::kSumRows;
    // Rows as long as they are: of pieces of a page, memory delivers half of each again with the other one.
    const int64_t size = last - first;
    for (int64_t t = 0; t < tokens; t++) std::fill_n(y + t * w.width + first, size, 0.0f);
    Rows<R> next = {};
    if (count > 0) next = find<R>(w, chosen, 0, count);
    for (int64_t i = 0; i < count; i += R) {
      const Rows<R> now = next;
      next = find_next<R>(w, chosen, i, count, {});
      for (int64_t t = 0; t < tokens; t++) {
        float factor[R];
        TRIMTAB_UNROLL for (int r = 0; r < R; r++) factor[r] = i + r < count ? h[t * h_stride + i + r] : 0.0f;
        Kernel::template sum<decltype(apart)::value>(now, next, factor, first, size, y + t * w.width + first);
      }
    }
    for (int64_t t = 0; t < tokens; t++) Kernel::order(y + t * w.width + first, size);
  });
}

void sum_by_block(const Weights& w, const Takers& takers, const float* h, int64_t h_stride, int64_t tokens, bool some,
                  int64_t first, int64_t last, float* y) {
  if (some) return sum_many_by_block(w, takers, h, h_stride, tokens, first, last, y);
  with(w.format, false, [&](auto kernel, auto apart) {
    using Kernel = decltype(kernel);
    constexpr int R = Kernel::kSumRows;
    const int64_t size = takers.size, width = last - first;
    for (int64_t t = 0; t < tokens; t++) std::fill_n(y + t * w.width + first, width, 0.0f);
    for (int64_t b = 0; b < takers.count; b++) {
      const Chosen chosen{takers.blocks + b, size};
      const bool more = b + 1 < takers.count;  // blocks follow, whose first rows are asked for with the last ones of this
      Rows<R> next = find<R>(w, chosen, 0, size);
      for (int64_t i = 0; i < size; i += R) {
        const Rows<R> now = next;
        next = find<R>(w, chosen, i + R < size || !more ? std::min(i + R, size - 1) : size, more ? 2 * size : size);
        for (int64_t at = takers.starts[b]; at < takers.starts[b + 1]; at++) {
          const float* from = h + takers.tokens[at] * h_stride + takers.places[at] * size + i;
          float factor[R];
          TRIMTAB_UNROLL for (int r = 0; r < R; r++) factor[r] = i + r < size ? from[r] : 0.0f;
          Kernel::template sum<decltype(apart)::value>(now, next, factor, first, width, y + takers.tokens[at] * w.width + first);
        }
      }
    }
    for (int64_t t = 0; t < tokens; t++) Kernel::order(y + t * w.width + first, width);
  });
}

template <Activation kind>
void finish_as(float* h, const float* gate, int64_t count) {
  const auto of = [&](vf up, vf g) {
    const vf x = gate != nullptr ? g : up, y = activate<kind>(x), kept = x == x ? y : x;  // NaN stays
    return gate != nullptr ? kept * up : kept;
  };
  int64_t i = 0;
  for (; i + V <= count; i += V) store(h + i, of(load<vf>(h + i), gate != nullptr ? load<vf>(gate + i) : vf{}));
  if (i == count) return;
  const vf last = of(load_some(h + i, count - i), gate != nullptr ? load_some(gate + i, count - i) : vf{});
  std::memcpy(h + i, &last, 4 * (count - i));
}

void finish(Activation kind, float* h, const float* gate, int64_t count) {
  switch (kind) {
    case Activation::relu: return finish_as<Activation::relu>(h, gate, count);
    case Activation::relu_squared: return finish_as<Activation::relu_squared>(h, gate, count);
    case Activation::silu: return finish_as<Activation::silu>(h, gate, count);
    case Activation::gelu: return finish_as<Activation::gelu>(h, gate, count);
    case Activation::gelu_tanh: return finish_as<Activation::gelu_tanh>(h, gate, count);
    case Activation::quick_gelu: return finish_as<Activation::quick_gelu>(h, gate, count);
    case Activation::sigmoid: return finish_as<Activation::sigmoid>(h, gate, count);
    case Activation::tanh: return finish_as<Activation::tanh>(h, gate, count);
    default: return finish_as<Activation::identity>(h, gate, count);
  }
}

// `count` values of x as 16-bit integers; returns their scale, which is NaN where one is not finite.
float round_group(const float* x, int64_t count, int16_t* out) {
  vf largest = {}, spoilt = {};  // x * 0 is NaN where x is not finite
  float most = 0, nothing = 0;
  int64_t i = 0;
  for (; i + V <= count; i += V) largest = larger(largest, magnitude(load<vf>(x + i))), spoilt += load<vf>(x + i) * 0.0f;
  for (int v = 0; v < V; v++) most = std::max(most, largest[v]), nothing += spoilt[v];
  for (; i < count; i++) most = std::max(most, std::fabs(x[i])), nothing += x[i] * 0;
  const float inverse = most > 0 ? 32767 / most : 0;
  for (i = 0; i + V <= count; i += V) {
    const vi rounded = round_to_integers(load<vf>(x + i) * inverse);
    for (int v = 0; v < V; v++) out[i + v] = static_cast<int16_t>(rounded[v]);
  }
  for (; i < count; i++) out[i] = static_cast<int16_t>(std::lrintf(x[i] * inverse));
  return most / 32767 + nothing;
}

void prepare(Format format, const float* x, int64_t width, int16_t* integers, float* scale, float* less) {
  for (int64_t begin = 0; begin < width; begin += kGroup, integers += kGroup, less += kGroup / kInt4Block) {
    int16_t plain[kGroup] = {};
    const int64_t size = std::min(kGroup, width - begin);
    *scale++ = round_group(x + begin, size, plain);
    if (format == Format::int8) {
      Int8Kernel::split(plain, size, integers);
      continue;
    }
    Int4Kernel::split(plain, integers);
    for (int64_t i = 0; i < kGroup; i += kInt4Block) {
      int32_t all = 0;
      for (int64_t j = i; j < i + kInt4Block; j++) all += plain[j];
      less[i / kInt4Block] = static_cast<float>(-8 * all);
    }
  }
}

}  // namespace

const Kernels TRIMTAB_KERNELS = {
    TRIMTAB_ISA, dot, sum, sum_by_block, finish, prepare, nullptr};

}  // namespace trimtab
