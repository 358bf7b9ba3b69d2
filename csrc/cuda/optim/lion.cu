// Lion (arXiv:2302.06675) over many tensors in one launch (batch.cuh).

#include "elements.cuh"

namespace megatune::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int CHUNK = 8192;  // elements

struct Table : Batch<LionTensor, 500> {
  LionStep step;
};
static_assert(sizeof(Table) <= 32764, "a kernel's arguments have at most this many bytes");

// The operations of csrc/cpu/lion.inl in their order, none of them fused.
__device__ inline void update(const LionStep& s, float keep, float scale, float g, float& p, float& m) {
  g = __fmul_rn(g, scale);
  const float c = __fadd_rn(__fmul_rn(s.beta1, m), __fmul_rn(s.rest1, g));
  m = __fadd_rn(__fmul_rn(s.beta2, m), __fmul_rn(s.rest2, g));
  const float taken = c > 0.0f ? s.lr : c < 0.0f ? -s.lr : 0.0f;
  p = __fsub_rn(__fmul_rn(p, keep), taken);
}

__global__ void __launch_bounds__(THREADS) lion_kernel(const __grid_constant__ Table table) {
  const int chunk = blockIdx.x;
  const int low = table.holder(chunk);
  const LionTensor& t = table.tensors[low];
  const float scale = *table.step.scale;
  const int64_t begin = static_cast<int64_t>(chunk - table.first[low]) * CHUNK;
  const int64_t end = min(begin + CHUNK, t.n);
  const bool fits = at_16_bytes(t.master, t.exp_avg, t.grad, t.weight);
  const int64_t whole = fits ? begin + (end - begin) / 4 * 4 : begin;
  for (int64_t i = begin + threadIdx.x * 4; i < whole; i += THREADS * 4) {
    float4 p = *reinterpret_cast<float4*>(t.master + i);
    float4 m = *reinterpret_cast<float4*>(t.exp_avg + i);
    const float4 g = load_grad(t, i);
    update(table.step, t.keep, scale, g.x, p.x, m.x);
    update(table.step, t.keep, scale, g.y, p.y, m.y);
    update(table.step, t.keep, scale, g.z, p.z, m.z);
    update(table.step, t.keep, scale, g.w, p.w, m.w);
    *reinterpret_cast<float4*>(t.master + i) = p;
    *reinterpret_cast<float4*>(t.exp_avg + i) = m;
    store_weight(t, i, p);
  }
  for (int64_t i = whole + threadIdx.x; i < end; i += THREADS) {
    float p = t.master[i], m = t.exp_avg[i];
    update(table.step, t.keep, scale, load_grad_one(t, i), p, m);
    t.master[i] = p;
    t.exp_avg[i] = m;
    store_weight_one(t, i, p);
  }
}

}  // namespace

int lion(const LionTensor* tensors, int64_t count, const LionStep& step, Stream stream) {
  Table table;
  table.step = step;
  for (int64_t at = 0; at < count;) {
    at = table.fill(tensors, at, count, CHUNK);
    if (table.count == 0) break;
    lion_kernel<<<table.chunks(), THREADS, 0, stream>>>(table);
    const int error = launched();
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace megatune::cuda
