// Gradients and weights of either dtype, four at a time or one by one, and the update of AdamW for one element.
#pragma once

#include <cuda_bf16.h>

#include "../common/launch.cuh"
#include "batch.cuh"
#include "megatune/cuda_optim.h"

namespace megatune::cuda {

// The operations of csrc/cpu/adamw_element.inl in their order, none of them fused: the same bits as on a CPU.
__device__ inline void adamw_element(const AdamWStep& s, float keep, float scale, float g, float& p, float& m,
                                     float& v) {
  g = __fmul_rn(g, scale);
  m = __fadd_rn(__fmul_rn(s.beta1, m), __fmul_rn(s.rest1, g));
  v = __fadd_rn(__fmul_rn(s.beta2, v), __fmul_rn(s.rest2, __fmul_rn(g, g)));
  const float below = __fadd_rn(__fmul_rn(__fsqrt_rn(v), s.root), s.eps);
  p = __fsub_rn(__fmul_rn(p, keep), __fdiv_rn(__fmul_rn(s.step_size, m), below));
}

__device__ inline float4 load_low(const __nv_bfloat16* from) {
  const uint2 bits = *reinterpret_cast<const uint2*>(from);
  return make_float4(__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xffff0000u),
                     __uint_as_float(bits.y << 16), __uint_as_float(bits.y & 0xffff0000u));
}

// T: a tensor with grad, low_grad, weight, low_weight.
template <class T>
__device__ inline float4 load_grad(const T& t, int64_t i) {
  if (t.low_grad) return load_low(static_cast<const __nv_bfloat16*>(t.grad) + i);
  return *reinterpret_cast<const float4*>(static_cast<const float*>(t.grad) + i);
}

template <class T>
__device__ inline float load_grad_one(const T& t, int64_t i) {
  return t.low_grad ? __bfloat162float(static_cast<const __nv_bfloat16*>(t.grad)[i])
                    : static_cast<const float*>(t.grad)[i];
}

template <class T>
__device__ inline void store_weight(const T& t, int64_t i, float4 p) {
  if (t.weight == nullptr) return;
  if (!t.low_weight) {
    *reinterpret_cast<float4*>(static_cast<float*>(t.weight) + i) = p;
    return;
  }
  __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(p.x, p.y), __floats2bfloat162_rn(p.z, p.w)};
  *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(t.weight) + i) = *reinterpret_cast<uint2*>(pairs);
}

template <class T>
__device__ inline void store_weight_one(const T& t, int64_t i, float p) {
  if (t.weight == nullptr) return;
  if (t.low_weight) {
    static_cast<__nv_bfloat16*>(t.weight)[i] = __float2bfloat16_rn(p);
  } else {
    static_cast<float*>(t.weight)[i] = p;
  }
}

template <class... Pointers>
__device__ inline bool at_16_bytes(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers)) | ...) % 16 == 0;
}

}  // namespace megatune::cuda
