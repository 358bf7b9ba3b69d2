// AdamW with moments in 8 bits (arXiv:2110.02861) over many tensors in one launch (batch.cuh): a warp has a block of 256
// elements in its registers, from the old codes to the new ones.

#include "elements.cuh"
#include "megatune/codes.h"

namespace megatune::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int CHUNK = 16384;  // elements
constexpr int EACH = codes::BLOCK / 32;  // elements of a thread: two times four in line

struct Table : Batch<AdamW8bitTensor, 380> {
  AdamWStep step;
};
static_assert(sizeof(Table) <= 32764, "a kernel's arguments have at most this many bytes");

// What codes stand for and how they are found, one copy for each block of threads.
struct alignas(16) Lookup {
  codes::Map<true> first;
  codes::Map<false> second;
};
__device__ const Lookup lookup_table = {codes::make<true>(), codes::make<false>()};
static_assert(codes::make<true>().good && codes::make<false>().good, "two borders in one cell");

__device__ inline float value_of(const codes::Map<true>& map, uint32_t code) {
  const int place = static_cast<int>(code) - 127;
  const float value = map.values[abs(place)];
  return place < 0 ? -value : value;
}

__device__ inline float value_of(const codes::Map<false>& map, uint32_t code) { return map.values[code]; }

template <bool is_signed>
__device__ inline int cell_of(uint32_t bits) {
  using Map = codes::Map<is_signed>;
  const int cell = static_cast<int>(bits >> (23 - Map::BITS)) - Map::FIRST_CELL + 1;
  return min(max(cell, 0), Map::CELLS + 1);
}

__device__ inline uint32_t code_of(const codes::Map<true>& map, float x) {
  const float size = fabsf(x);
  const int first = map.first[cell_of<true>(__float_as_uint(size))];
  const float border = map.borders[first];
  if (x < 0.0f) return 127 - min(first + (size >= border ? 1 : 0), 127);
  return 127 + first + (size <= border ? 0 : 1);
}

__device__ inline uint32_t code_of(const codes::Map<false>& map, float x) {
  const int first = map.first[cell_of<false>(__float_as_uint(x))];
  return first + (x <= map.borders[first] ? 0 : 1);
}

// The largest of the warp's numbers >= 0 (as bits they are in the same order, any NaN above all).
__device__ inline float largest(float x) {
  unsigned bits = __float_as_uint(x);
  for (int lane = 16; lane > 0; lane /= 2) bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, lane));
  return __uint_as_float(bits);
}

// New codes and scale of a warp's 256 numbers.
template <bool is_signed>
__device__ inline void encode(const codes::Map<is_signed>& map, const float (&x)[EACH], uint32_t (&packed)[2],
                              float* scale) {
  float most = 0.0f;
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    // fmaxf would lose a NaN.
    most = __uint_as_float(max(__float_as_uint(most), __float_as_uint(fabsf(x[k]))));
  }
  most = largest(most);
  // x / scale by multiplications, which is the same but for the rounding. 1 / scale must not be infinite.
  const float up = most < 1e-30f ? 0x1p64f : 1.0f;
  const float inverse = most > 0.0f ? __frcp_rn(__fmul_rn(most, up)) : 1.0f;
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const uint32_t code = code_of(map, __fmul_rn(__fmul_rn(x[k], up), inverse));
    packed[k / 4] = k % 4 == 0 ? code : packed[k / 4] | code << (8 * (k % 4));
  }
  if (threadIdx.x % 32 == 0) *scale = most;
}

// A block of 256 elements from `at` on; `count` of them are there, all 256 if `fits`, which says that they can be
// loaded and stored in fours.
template <bool fits>
__device__ inline void block_of(const AdamW8bitTensor& t, const AdamWStep& step, const Lookup& lookup, float scale,
                                int64_t at, int count) {
  float p[EACH], m[EACH], v[EACH], g[EACH];
  const int lane = static_cast<int>(threadIdx.x % 32);
  const float m_scale = t.exp_avg_scale[at / codes::BLOCK], v_scale = t.exp_avg_sq_scale[at / codes::BLOCK];
  uint32_t m_codes[2], v_codes[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int from = half * 128 + lane * 4;
    if constexpr (fits) {
      const float4 four = *reinterpret_cast<const float4*>(t.master + at + from);
      const float4 grad = load_grad(t, at + from);
      m_codes[half] = *reinterpret_cast<const uint32_t*>(t.exp_avg + at + from);
      v_codes[half] = *reinterpret_cast<const uint32_t*>(t.exp_avg_sq + at + from);
      p[half * 4] = four.x, p[half * 4 + 1] = four.y, p[half * 4 + 2] = four.z, p[half * 4 + 3] = four.w;
      g[half * 4] = grad.x, g[half * 4 + 1] = grad.y, g[half * 4 + 2] = grad.z, g[half * 4 + 3] = grad.w;
    } else {
      m_codes[half] = v_codes[half] = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const bool is_there = from + k < count;
        const int64_t i = at + from + k;
        p[half * 4 + k] = is_there ? t.master[i] : 0.0f;
        g[half * 4 + k] = is_there ? load_grad_one(t, i) : 0.0f;
        m_codes[half] |= (is_there ? static_cast<uint32_t>(t.exp_avg[i]) : 127u) << (8 * k);
        v_codes[half] |= (is_there ? static_cast<uint32_t>(t.exp_avg_sq[i]) : 0u) << (8 * k);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    m[k] = __fmul_rn(value_of(lookup.first, m_codes[k / 4] >> (8 * (k % 4)) & 0xffu), m_scale);
    v[k] = __fmul_rn(value_of(lookup.second, v_codes[k / 4] >> (8 * (k % 4)) & 0xffu), v_scale);
    adamw_element(step, t.keep, scale, g[k], p[k], m[k], v[k]);
    if (!fits && k / 4 * 128 + lane * 4 + k % 4 >= count) m[k] = v[k] = 0.0f;
  }
  encode(lookup.first, m, m_codes, t.exp_avg_scale + at / codes::BLOCK);
  encode(lookup.second, v, v_codes, t.exp_avg_sq_scale + at / codes::BLOCK);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int from = half * 128 + lane * 4;
    if constexpr (fits) {
      const float4 four = make_float4(p[half * 4], p[half * 4 + 1], p[half * 4 + 2], p[half * 4 + 3]);
      *reinterpret_cast<float4*>(t.master + at + from) = four;
      *reinterpret_cast<uint32_t*>(t.exp_avg + at + from) = m_codes[half];
      *reinterpret_cast<uint32_t*>(t.exp_avg_sq + at + from) = v_codes[half];
      store_weight(t, at + from, four);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (from + k >= count) continue;
        const int64_t i = at + from + k;
        t.master[i] = p[half * 4 + k];
        t.exp_avg[i] = static_cast<uint8_t>(m_codes[half] >> (8 * k));
        t.exp_avg_sq[i] = static_cast<uint8_t>(v_codes[half] >> (8 * k));
        store_weight_one(t, i, p[half * 4 + k]);
      }
    }
  }
}

__global__ void __launch_bounds__(THREADS, 2) adamw_8bit_kernel(const __grid_constant__ Table table) {
  __shared__ Lookup lookup;
  static_assert(sizeof(Lookup) % 16 == 0);
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(Lookup) / 16); i += THREADS)
    reinterpret_cast<uint4*>(&lookup)[i] = reinterpret_cast<const uint4*>(&lookup_table)[i];
  __syncthreads();
  const int chunk = blockIdx.x;
  const int low = table.holder(chunk);
  const AdamW8bitTensor& t = table.tensors[low];
  const float scale = *table.step.scale;
  const int64_t begin = static_cast<int64_t>(chunk - table.first[low]) * CHUNK;
  const int64_t end = min(begin + CHUNK, t.n);
  const bool fits = at_16_bytes(t.master, t.exp_avg, t.exp_avg_sq, t.grad, t.weight);
  for (int64_t at = begin + threadIdx.x / 32 * codes::BLOCK; at < end; at += WARPS * codes::BLOCK) {
    const int count = static_cast<int>(min(end - at, static_cast<int64_t>(codes::BLOCK)));
    if (fits && count == codes::BLOCK) {
      block_of<true>(t, table.step, lookup, scale, at, count);
    } else {
      block_of<false>(t, table.step, lookup, scale, at, count);
    }
  }
}

}  // namespace

int adamw_8bit(const AdamW8bitTensor* tensors, int64_t count, const AdamWStep& step, Stream stream) {
  Table table;
  table.step = step;
  for (int64_t at = 0; at < count;) {
    at = table.fill(tensors, at, count, CHUNK);
    if (table.count == 0) break;
    adamw_8bit_kernel<<<table.chunks(), THREADS, 0, stream>>>(table);
    const int error = launched();
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace megatune::cuda
