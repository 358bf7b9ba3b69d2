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

// Root and quotient as the compiler makes them where nothing is subnormal, infinite or 0, without its branch for the
// rest: several elements at a time can be under way.
__device__ inline float plain_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  const float g = __fmul_rn(x, y), h = __fmul_rn(y, 0.5f);
  return __fmaf_rn(__fmaf_rn(-g, g, x), h, g);
}

__device__ inline float plain_quotient(float a, float b) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(b));
  y = __fmaf_rn(y, __fmaf_rn(-b, y, 1.0f), y);
  float q = __fmul_rn(a, y);
  q = __fmaf_rn(__fmaf_rn(-b, q, a), y, q);
  return __fmaf_rn(__fmaf_rn(-b, q, a), y, q);
}

// Whether the divisors that come of roots of [2^-100, 2^20] are in reach of the plain quotient.
__device__ inline bool is_plain(const AdamWStep& s) {
  return s.root >= 1.0f && s.root < 0x1p20f && s.eps > 0.0f && s.eps < 0x1p20f;
}

// `adamw_element` for several.
template <int N>
__device__ inline void adamw_elements(const AdamWStep& s, float keep, float scale, const float (&g)[N], float (&p)[N],
                                      float (&m)[N], float (&v)[N]) {
  bool plain = is_plain(s);
  float step[N];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float grad = __fmul_rn(g[k], scale);
    m[k] = __fadd_rn(__fmul_rn(s.beta1, m[k]), __fmul_rn(s.rest1, grad));
    v[k] = __fadd_rn(__fmul_rn(s.beta2, v[k]), __fmul_rn(s.rest2, __fmul_rn(grad, grad)));
    step[k] = __fmul_rn(s.step_size, m[k]);
    // 0 by any divisor is 0: rows of a table that were never looked up.
    const bool is_zero = __float_as_uint(step[k]) == 0;
    plain &= (v[k] <= 0x1p20f) & (fabsf(step[k]) <= 0x1p60f) &
             (((v[k] >= 0x1p-100f) & (fabsf(step[k]) >= 0x1p-90f)) | is_zero);
  }
  if (plain) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float below = __fadd_rn(__fmul_rn(plain_root(fmaxf(v[k], 0x1p-100f)), s.root), s.eps);
      p[k] = __fsub_rn(__fmul_rn(p[k], keep), plain_quotient(step[k], below));
    }
    return;
  }
#pragma unroll 1
  for (int k = 0; k < N; ++k) {
    // One copy of the code: the element is picked, so that all stay in registers.
    float root = v[0], taken = step[0];
#pragma unroll
    for (int j = 1; j < N; ++j) {
      if (j == k) root = v[j], taken = step[j];
    }
    taken = __fdiv_rn(taken, __fadd_rn(__fmul_rn(__fsqrt_rn(root), s.root), s.eps));
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (j == k) p[j] = __fsub_rn(__fmul_rn(p[j], keep), taken);
    }
  }
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
