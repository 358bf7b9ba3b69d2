// AdamW on bf16 parameters, rounded by random bits, over many tensors in one launch (batch.cuh).

#include "elements.cuh"
#include "megatune/philox.h"

namespace megatune::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int WARP = 256;    // elements that a warp has at a time
constexpr int CHUNK = 4096;  // elements

struct Table : Batch<AdamWBf16Tensor, 380> {
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

__device__ inline void put(float* to, float4 four) {
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

__device__ inline uint32_t rounded(float low, float high, uint32_t word) {
  return round_by(__float_as_uint(low), word & 0xffffu) |
         static_cast<uint32_t>(round_by(__float_as_uint(high), word >> 16)) << 16;
}

// The place in its parameter of a tensor's number `at`, of its elements, or of its blocks of eight (EACH).
template <int EACH>
__device__ inline uint64_t place(const AdamWBf16Tensor& t, int64_t at, bool rows) {
  if (rows) {
    const uint32_t width = static_cast<uint32_t>(t.width / EACH), row = static_cast<uint32_t>(at) / width;
    at = row * (t.stride / EACH) + (static_cast<uint32_t>(at) - row * width);
  }
  return static_cast<uint64_t>(t.first / EACH + at);
}

// 256 elements of a warp from i on (all borders of rows at multiples of eight), four and four of each thread. Two
// lanes that are neighbours share the words of two blocks: each makes one.
__device__ inline void whole_block(const AdamWBf16Tensor& t, const AdamWStep& step, uint64_t number, float scale,
                                   int64_t i, bool rows) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  float p[8], m[8], v[8], g[8];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t at = i + half * 128 + lane * 4;
    put(p + half * 4, load_low(static_cast<const __nv_bfloat16*>(t.master) + at));
    put(m + half * 4, *reinterpret_cast<const float4*>(t.exp_avg + at));
    put(v + half * 4, *reinterpret_cast<const float4*>(t.exp_avg_sq + at));
    put(g + half * 4, load_grad(t, at));
  }
  const bool odd = lane % 2 != 0;
  const uint64_t block = place<8>(t, i / 8 + (odd ? 16 : 0) + lane / 2, rows);
  const Words own = philox(block, number, t.key);
  // The even lane keeps words 0 and 1 of the first block and gets those of the second; the odd one has words 2 and 3.
  const uint32_t one = __shfl_xor_sync(0xffffffffu, odd ? own.at[0] : own.at[2], 1);
  const uint32_t two = __shfl_xor_sync(0xffffffffu, odd ? own.at[1] : own.at[3], 1);
  const uint32_t words[4] = {odd ? one : own.at[0], odd ? two : own.at[1], odd ? own.at[2] : one,
                             odd ? own.at[3] : two};
  adamw_elements(step, t.keep, scale, g, p, m, v);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t at = i + half * 128 + lane * 4;
    const int k = half * 4;
    *reinterpret_cast<float4*>(t.exp_avg + at) = make_float4(m[k], m[k + 1], m[k + 2], m[k + 3]);
    *reinterpret_cast<float4*>(t.exp_avg_sq + at) = make_float4(v[k], v[k + 1], v[k + 2], v[k + 3]);
    uint2 out;
    out.x = rounded(p[k], p[k + 1], words[half * 2]);
    out.y = rounded(p[k + 2], p[k + 3], words[half * 2 + 1]);
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(t.master) + at) = out;
  }
}

__global__ void __launch_bounds__(THREADS) adamw_bf16_kernel(const __grid_constant__ Table table) {
  const int chunk = blockIdx.x;
  const int low = table.holder(chunk);
  const AdamWBf16Tensor& t = table.tensors[low];
  const float scale = *table.step.scale;
  const int64_t begin = static_cast<int64_t>(chunk - table.first[low]) * CHUNK;
  const int64_t end = min(begin + CHUNK, t.n);
  uint16_t* const master = static_cast<uint16_t*>(t.master);
  const bool rows = t.width < t.n;
  const bool fits = at_16_bytes(t.master, t.exp_avg, t.exp_avg_sq, t.grad) && t.first % 8 == 0 &&
                    (!rows || (t.width % 8 == 0 && t.stride % 8 == 0));
  const int64_t whole = fits ? begin + (end - begin) / WARP * WARP : begin;
  for (int64_t i = begin + threadIdx.x / 32 * WARP; i < whole; i += THREADS / 32 * WARP)
    whole_block(t, table.step, table.number, scale, i, rows);
  for (int64_t i = whole + threadIdx.x; i < end; i += THREADS) {
    float p = __uint_as_float(static_cast<uint32_t>(master[i]) << 16), m = t.exp_avg[i], v = t.exp_avg_sq[i];
    adamw_element(table.step, t.keep, scale, load_grad_one(t, i), p, m, v);
    t.exp_avg[i] = m;
    t.exp_avg_sq[i] = v;
    const uint64_t index = place<1>(t, i, rows);
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
