// Activations of vectors. Errors are those of float32: a few 1e-8 of the largest value around.
#pragma once

#include "activation.h"
#include "vectors.h"

namespace trimtab {
namespace {

// 2^p for p in [-126, 127]: 2^round(p) by its exponent, the rest by a polynomial of relative error 3e-9.
inline vf exp2_of(vf p) {
  const vi whole = round_to_integers(p);
  const vf f = p - __builtin_convertvector(whole, vf);
  vf r = f * 0.00015461444854736328f + 0.0013400427997112274f;
  r = r * f + 0.009618056938052177f;
  r = r * f + 0.05550327152013779f;
  r = r * f + 0.24022650718688965f;
  r = r * f + 0.6931471824645996f;
  r = r * f + 1.0f;
  return (vf)((vi)r + (whole << 23));
}

inline vf within(vf x, float low, float high) {
  const vf least = vf{} + low, most = vf{} + high;
  x = x < least ? least : x;
  return x > most ? most : x;
}

// 1 / (1 + exp(-x))
inline vf sigmoid_of(vf x) { return 1.0f / (1.0f + exp2_of(within(x * -1.44269504f, -126.0f, 126.0f))); }

// gelu(x) = max(x, 0) - t Phi(-t) with t = |x|, and Phi(-t) = 2^P(t): one polynomial serves all of x, since log2 Phi is
// nearly quadratic. It has the least error of t Phi(-t) for t up to 6, 4e-8 in float32; beyond, that is less than 1e-8.
inline vf gelu_of(vf x) {
  vf t = magnitude(x);
  t = t < 6.0f ? t : vf{} + 6.0f;
  vf p = t * 3.7031310284874053e-07f + -7.426508091157302e-06f;
  p = p * t + 6.181617936817929e-05f;
  p = p * t + -0.00024092000967357308f;
  p = p * t + -6.845772441010922e-05f;
  p = p * t + 0.007026262115687132f;
  p = p * t + -0.052497588098049164f;
  p = p * t + -0.45919910073280334f;
  p = p * t + -1.151107907295227f;
  p = p * t + -0.9999998211860657f;
  return larger(x, vf{}) - t * exp2_of(p);
}

template <Activation kind>
inline vf activate(vf x) {
  switch (kind) {
    case Activation::relu: return larger(x, vf{});
    case Activation::relu_squared: {
      const vf r = larger(x, vf{});
      return r * r;
    }
    case Activation::silu: return x * sigmoid_of(x);
    case Activation::gelu: return gelu_of(x);
    case Activation::gelu_tanh: return x * sigmoid_of(1.5957691216f * (x + 0.044715f * x * x * x));
    case Activation::quick_gelu: return x * sigmoid_of(1.702f * x);
    case Activation::sigmoid: return sigmoid_of(x);
    case Activation::tanh: return 2.0f * sigmoid_of(2.0f * x) - 1.0f;
    default: return x;
  }
}

}  // namespace
}  // namespace trimtab
