// AdamW (arXiv:1711.05101) over many tensors in one launch (batch.cuh).

#include <cuda_bf16.h>

#include "../common/launch.cuh"
#include "batch.cuh"
#include "megatune/cuda_optim.h"

namespace megatune::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int CHUNK = 4096;  // elements

struct Table : Batch<AdamWTensor, 500> {
  AdamWStep step;
};
static_assert(sizeof(Table) <= 32764, "a kernel's arguments have at most this many bytes");

// The operations of csrc/cpu/adamw.inl in their order, none of them fused: the same bits as on a CPU.
__device__ inline void update(const AdamWStep& s, float keep, float scale, float g, float& p, float& m, float& v) {
  g = __fmul_rn(g, scale);
  m = __fadd_rn(__fmul_rn(s.beta1, m), __fmul_rn(s.rest1, g));
  v = __fadd_rn(__fmul_rn(s.beta2, v), __fmul_rn(s.rest2, __fmul_rn(g, g)));
  const float below = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), s.root), s.eps);
  p = __fsub_rn(__fmul_rn(p, keep), __fdiv_rn(__fmul_rn(s.step_size, m), below));
}

__device__ inline float4 load_grad(const AdamWTensor& t, int64_t i) {
  if (!t.low_grad) return *reinterpret_cast<const float4*>(static_cast<const float*>(t.grad) + i);
  const uint2 bits = *reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(t.grad) + i);
  return make_float4(__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xffff0000u),
                     __uint_as_float(bits.y << 16), __uint_as_float(bits.y & 0xffff0000u));
}

__device__ inline void store_weight(const AdamWTensor& t, int64_t i, float4 p) {
  if (!t.low_weight) {
    *reinterpret_cast<float4*>(static_cast<float*>(t.weight) + i) = p;
    return;
  }
  __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(p.x, p.y), __floats2bfloat162_rn(p.z, p.w)};
  *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(t.weight) + i) = *reinterpret_cast<uint2*>(pairs);
}

__device__ inline bool at_16_bytes(const AdamWTensor& t) {
  const uintptr_t low = reinterpret_cast<uintptr_t>(t.grad) | reinterpret_cast<uintptr_t>(t.weight);
  const uintptr_t all = reinterpret_cast<uintptr_t>(t.master) | reinterpret_cast<uintptr_t>(t.exp_avg) |
                        reinterpret_cast<uintptr_t>(t.exp_avg_sq) | low;
  return all % 16 == 0;
}

__device__ inline void one_by_one(const AdamWTensor& t, const AdamWStep& step, float scale, int64_t begin,
                                  int64_t end) {
  for (int64_t i = begin + threadIdx.x; i < end; i += THREADS) {
    const float g = t.low_grad ? __bfloat162float(static_cast<const __nv_bfloat16*>(t.grad)[i])
                               : static_cast<const float*>(t.grad)[i];
    float p = t.master[i], m = t.exp_avg[i], v = t.exp_avg_sq[i];
    update(step, t.keep, scale, g, p, m, v);
    t.master[i] = p;
    t.exp_avg[i] = m;
    t.exp_avg_sq[i] = v;
    if (t.weight == nullptr) continue;
    if (t.low_weight) {
      static_cast<__nv_bfloat16*>(t.weight)[i] = __float2bfloat16_rn(p);
    } else {
      static_cast<float*>(t.weight)[i] = p;
    }
  }
}

__global__ void __launch_bounds__(THREADS) adamw_kernel(const __grid_constant__ Table table) {
  const int chunk = blockIdx.x;
  const int low = table.holder(chunk);
  const AdamWTensor& t = table.tensors[low];
  const float scale = *table.step.scale;
  const int64_t begin = static_cast<int64_t>(chunk - table.first[low]) * CHUNK;
  const int64_t end = min(begin + CHUNK, t.n);
  const int64_t whole = at_16_bytes(t) ? begin + (end - begin) / 4 * 4 : begin;
  for (int64_t i = begin + threadIdx.x * 4; i < whole; i += THREADS * 4) {
    float4 p = *reinterpret_cast<float4*>(t.master + i);
    float4 m = *reinterpret_cast<float4*>(t.exp_avg + i);
    float4 v = *reinterpret_cast<float4*>(t.exp_avg_sq + i);
    const float4 g = load_grad(t, i);
    update(table.step, t.keep, scale, g.x, p.x, m.x, v.x);
    update(table.step, t.keep, scale, g.y, p.y, m.y, v.y);
    update(table.step, t.keep, scale, g.z, p.z, m.z, v.z);
    update(table.step, t.keep, scale, g.w, p.w, m.w, v.w);
    *reinterpret_cast<float4*>(t.master + i) = p;
    *reinterpret_cast<float4*>(t.exp_avg + i) = m;
    *reinterpret_cast<float4*>(t.exp_avg_sq + i) = v;
    if (t.weight != nullptr) store_weight(t, i, p);
  }
  one_by_one(t, table.step, scale, whole, end);
}

}  // namespace

int adamw(const AdamWTensor* tensors, int64_t count, const AdamWStep& step, Stream stream) {
  Table table;
  table.step = step;
  for (int64_t at = 0; at < count;) {
    at = table.fill(tensors, at, count, CHUNK);
    if (table.count == 0) break;
    adamw_kernel<<<table.chunks(), THREADS, 0, stream>>>(table);
    const int error = launched();
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace megatune::cuda
