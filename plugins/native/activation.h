// The activations of FFNs, by the names that trimtab.passes.anatomy gives them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace trimtab {

enum class Activation : int32_t { identity, relu, relu_squared, silu, gelu, gelu_tanh, quick_gelu, sigmoid, tanh, unknown };

inline Activation activation_named(const char* name) {
  constexpr const char* names[] = {"identity", "relu",       "relu_squared", "silu", "gelu",
                                   "gelu_tanh", "quick_gelu", "sigmoid",      "tanh"};
  for (int32_t i = 0; i < 9; i++)
    if (std::strcmp(name, names[i]) == 0) return static_cast<Activation>(i);
  return Activation::unknown;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

inline float activate(Activation kind, float x) {
  switch (kind) {
    case Activation::relu: return x > 0 ? x : 0.0f;
    case Activation::relu_squared: return x > 0 ? x * x : 0.0f;
    case Activation::silu: return x * sigmoid(x);
    case Activation::gelu: return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    case Activation::gelu_tanh: return 0.5f * x * (1.0f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
    case Activation::quick_gelu: return x * sigmoid(1.702f * x);
    case Activation::sigmoid: return sigmoid(x);
    case Activation::tanh: return std::tanh(x);
    default: return x;
  }
}

}  // namespace trimtab
