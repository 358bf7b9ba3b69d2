// The activations of gated linear units; the formulas of megatune/ops/glu.py.
#pragma once

#include "megatune/cuda.h"

namespace megatune::cuda {

// activation(gate) and its derivative.
template <bool SLOPE>
__device__ float2 activate(float gate, Activation activation) {
  if (activation == Activation::gelu) {
    const float phi = 0.5f * (1.0f + erff(gate * 0.70710678118654752f));
    const float slope = SLOPE ? phi + gate * expf(-0.5f * gate * gate) * 0.39894228040143268f : 0.0f;
    return {gate * phi, slope};
  }
  float scaled = gate, steep = 1.0f;
  if (activation == Activation::gelu_tanh) {
    constexpr float scale = 1.5957691216057308f;  // 0.5 * (1 + tanh(u)) = sigmoid(2 u)
    scaled = scale * (gate + 0.044715f * gate * gate * gate);
    steep = scale * (1.0f + 3 * 0.044715f * gate * gate);
  }
  const float sigmoid = 1.0f / (1.0f + expf(-scaled));
  const float value = gate * sigmoid;
  return {value, SLOPE ? sigmoid + value * (1.0f - sigmoid) * steep : 0.0f};
}

}  // namespace megatune::cuda
