// AdamW on bf16 parameters, rounded by random bits, over many tensors in one launch (batch.cuh).

#include "elements.cuh"
#include "megatune/philox.h"

namespace megatune::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int CHUNK = 4096;  // elements

struct Table : Batch<AdamWBf16Tensor, 400> {
  AdamWStep step;
  uint64_t number;
};
static_assert(sizeof(Table) <= 32764, "a kernel's arguments have at most this many bytes");

// The 16 random bits of element `index` of its parameter, from its block's words.
__device__ inline uint32_t bits_of(const Words& words, uint32_t index) {
  const uint32_t pair = index / 2 % 4;
  const uint32_t word = pair < 2 ? (pair == 0 ? words.at[0] : words.at[1]) : (pair == 2 ? words.at[2] : words.at[3]);
  return index % 2 == 0 ? word & 0xffffu : word >> 16;
}

__global__ void __launch_bounds__(THREADS) adamw_bf16_kernel(const __grid_constant__ Table table) {
  const int chunk = blockIdx.x;
  const int low = table.holder(chunk);
  const AdamWBf16Tensor& t = table.tensors[low];
  const float scale = *table.step.scale;
  const int64_t begin = static_cast<int64_t>(chunk - table.first[low]) * CHUNK;
  const int64_t end = min(begin + CHUNK, t.n);
  uint16_t* const master = static_cast<uint16_t*>(t.master);
  // Four elements that begin at a multiple of four are in one half of a block.
  const bool fits = at_16_bytes(t.master, t.exp_avg, t.exp_avg_sq, t.grad) && t.first % 4 == 0;
  const int64_t whole = fits ? begin + (end - begin) / 4 * 4 : begin;
  for (int64_t i = begin + threadIdx.x * 4; i < whole; i += THREADS * 4) {
    float4 p = load_low(static_cast<const __nv_bfloat16*>(t.master) + i);
    float4 m = *reinterpret_cast<float4*>(t.exp_avg + i);
    float4 v = *reinterpret_cast<float4*>(t.exp_avg_sq + i);
    const float4 g = load_grad(t, i);
    adamw_element(table.step, t.keep, scale, g.x, p.x, m.x, v.x);
    adamw_element(table.step, t.keep, scale, g.y, p.y, m.y, v.y);
    adamw_element(table.step, t.keep, scale, g.z, p.z, m.z, v.z);
    adamw_element(table.step, t.keep, scale, g.w, p.w, m.w, v.w);
    *reinterpret_cast<float4*>(t.exp_avg + i) = m;
    *reinterpret_cast<float4*>(t.exp_avg_sq + i) = v;
    const uint64_t index = static_cast<uint64_t>(t.first + i);
    const Words words = philox(index / 8, table.number, t.key);
    const bool upper = index % 8 != 0;
    const uint32_t one = upper ? words.at[2] : words.at[0], two = upper ? words.at[3] : words.at[1];
    uint2 out;
    out.x = round_by(__float_as_uint(p.x), one & 0xffffu) |
            static_cast<uint32_t>(round_by(__float_as_uint(p.y), one >> 16)) << 16;
    out.y = round_by(__float_as_uint(p.z), two & 0xffffu) |
            static_cast<uint32_t>(round_by(__float_as_uint(p.w), two >> 16)) << 16;
    *reinterpret_cast<uint2*>(master + i) = out;
  }
  for (int64_t i = whole + threadIdx.x; i < end; i += THREADS) {
    float p = __uint_as_float(static_cast<uint32_t>(master[i]) << 16), m = t.exp_avg[i], v = t.exp_avg_sq[i];
    adamw_element(table.step, t.keep, scale, load_grad_one(t, i), p, m, v);
    t.exp_avg[i] = m;
    t.exp_avg_sq[i] = v;
    const uint64_t index = static_cast<uint64_t>(t.first + i);
    const Words words = philox(index / 8, table.number, t.key);
    master[i] = round_by(__float_as_uint(p), bits_of(words, static_cast<uint32_t>(index % 8)));
  }
}

}  // namespace

int adamw_bf16(const AdamWBf16Tensor* tensors, int64_t count, const AdamWStep& step, uint64_t number, Stream stream) {
  Table table;
  table.step = step;
  table.number = number;
  for (int64_t at = 0; at < count;) {
    at = table.fill(tensors, at, count, CHUNK);
    if (table.count == 0) break;
    adamw_bf16_kernel<<<table.chunks(), THREADS, 0, stream>>>(table);
    const int error = launched();
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace megatune::cuda
