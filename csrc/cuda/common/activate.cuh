// The activations of gated linear units; the formulas of megatune/ops/glu.py.
#pragma once

#include "megatune/cuda.h"

namespace megatune::cuda {

// 1 / (1 + exp(-x)). FAST: two instructions of the special unit, within (2 + |x|) * 1e-7: for what is rounded to 16
// bits.
template <bool FAST>
__device__ inline float sigmoid_of(float x) {
  if constexpr (!FAST) return 1.0f / (1.0f + expf(-x));
  float power, sigmoid;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(sigmoid) : "f"(1.0f + power));
  return sigmoid;
}

// activation(gate) and its derivative.
template <bool SLOPE, bool FAST = false>
__device__ float2 activate(float gate, Activation activation) {
  if (activation == Activation::gelu) {
    const float phi = 0.5f * (1.0f + erff(gate * 0.70710678118654752f));
    const float slope = SLOPE ? phi + gate * expf(-0.5f * gate * gate) * 0.39894228040143268f : 0.0f;
    return {gate * phi, slope};
  }
  float scaled = gate, steep = 1.0f;
  if (activation == Activation::gelu_tanh) {
    constexpr float scale = 1.5957691216057308f;  // 0.5 * (1 + tanh(u)) = sigmoid(2 u)
    const float square = gate * gate;
    scaled = gate * (scale + scale * 0.044715f * square);
    steep = scale + 3 * scale * 0.044715f * square;
  }
  const float sigmoid = sigmoid_of<FAST>(scaled);
  const float value = gate * sigmoid;
  return {value, SLOPE ? sigmoid + value * (1.0f - sigmoid) * steep : 0.0f};
}

}  // namespace megatune::cuda
