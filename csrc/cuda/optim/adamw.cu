// AdamW (arXiv:1711.05101) over many tensors in one launch (batch.cuh).

#include "elements.cuh"

namespace megatune::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int CHUNK = 4096;  // elements

struct Table : Batch<AdamWTensor, 500> {
  AdamWStep step;
};
static_assert(sizeof(Table) <= 32764, "a kernel's arguments have at most this many bytes");

__device__ inline void one_by_one(const AdamWTensor& t, const AdamWStep& step, float scale, int64_t begin,
                                  int64_t end) {
  for (int64_t i = begin + threadIdx.x; i < end; i += THREADS) {
    float p = t.master[i], m = t.exp_avg[i], v = t.exp_avg_sq[i];
    adamw_element(step, t.keep, scale, load_grad_one(t, i), p, m, v);
    t.master[i] = p;
    t.exp_avg[i] = m;
    t.exp_avg_sq[i] = v;
    store_weight_one(t, i, p);
  }
}

__global__ void __launch_bounds__(THREADS) adamw_kernel(const __grid_constant__ Table table) {
  const int chunk = blockIdx.x;
  const int low = table.holder(chunk);
  const AdamWTensor& t = table.tensors[low];
  const float scale = *table.step.scale;
  const int64_t begin = static_cast<int64_t>(chunk - table.first[low]) * CHUNK;
  const int64_t end = min(begin + CHUNK, t.n);
  const bool fits = at_16_bytes(t.master, t.exp_avg, t.exp_avg_sq, t.grad, t.weight);
  const int64_t whole = fits ? begin + (end - begin) / 4 * 4 : begin;
  for (int64_t i = begin + threadIdx.x * 4; i < whole; i += THREADS * 4) {
    float4 p = *reinterpret_cast<float4*>(t.master + i);
    float4 m = *reinterpret_cast<float4*>(t.exp_avg + i);
    float4 v = *reinterpret_cast<float4*>(t.exp_avg_sq + i);
    const float4 g = load_grad(t, i);
    adamw_element(table.step, t.keep, scale, g.x, p.x, m.x, v.x);
    adamw_element(table.step, t.keep, scale, g.y, p.y, m.y, v.y);
    adamw_element(table.step, t.keep, scale, g.z, p.z, m.z, v.z);
    adamw_element(table.step, t.keep, scale, g.w, p.w, m.w, v.w);
    *reinterpret_cast<float4*>(t.master + i) = p;
    *reinterpret_cast<float4*>(t.exp_avg + i) = m;
    *reinterpret_cast<float4*>(t.exp_avg_sq + i) = v;
    store_weight(t, i, p);
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
