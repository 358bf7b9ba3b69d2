// AdamW with moments in 8 bits (arXiv:2110.02861) over many tensors in one launch (batch.cuh): a warp has a block of 256
// elements in its registers, from the old codes to the new ones.

#include "elements.cuh"
#include "megatune/codes.h"

namespace megatune::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int RESIDENT = 3;  // blocks of threads of a multiprocessor
constexpr int CHUNK = 8192;  // elements
constexpr int EACH = codes::BLOCK / 32;  // elements of a thread: two times four in line

struct Table : Batch<AdamW8bitTensor, 380> {
  AdamWStep step;
};
static_assert(sizeof(Table) <= 32764, "a kernel's arguments have at most this many bytes");

// What codes stand for and how they are found, one copy for each block of threads.
struct alignas(16) Lookup {
  float first[256], second[256];
  codes::Cells<true> first_cells;
  codes::Cells<false> second_cells;
};

constexpr Lookup make_lookup() {
  Lookup lookup{};
  constexpr auto first = codes::make<true>();
  constexpr auto second = codes::make<false>();
  for (int i = 0; i < 256; ++i) {
    lookup.first[i] = i < 127 ? -first.values[127 - i] : first.values[i - 127];
    lookup.second[i] = second.values[i];
  }
  lookup.first_cells = codes::make_cells<true>();
  lookup.second_cells = codes::make_cells<false>();
  return lookup;
}
__device__ const Lookup lookup_table = make_lookup();

static_assert(codes::make_cells<true>().good && codes::make_cells<false>().good, "two borders in one cell");

// The place of a number of at most 1 (or a rounding more) in size; in byte 2.
template <bool is_signed>
__device__ inline uint32_t place_of(const codes::Cells<is_signed>& cells, float x) {
  using C = codes::Cells<is_signed>;
  uint32_t bits = __float_as_uint(x);
  if (is_signed) bits = __funnelshift_l(bits, bits, 1);
  const int at = __viaddmin_s32_relu(static_cast<int>(bits), -static_cast<int>(C::LOW), static_cast<int>(C::TOP));
  return cells.cells[at >> 16] + static_cast<uint32_t>(at);
}

// Bytes 0 and 1: all ones where these are negative.
__device__ inline uint32_t signs(float one, float two) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, 0x00fb;" : "=r"(result) : "r"(__float_as_uint(one)), "r"(__float_as_uint(two)));
  return result;
}

// Four codes from places; signed: 127 + place, or 127 - place, which is at least 0.
template <bool is_signed>
__device__ inline uint32_t pack(const uint32_t (&place)[4], const float* x) {
  const uint32_t places = __byte_perm(__byte_perm(place[0], place[1], 0x0062), __byte_perm(place[2], place[3], 0x0062),
                                      0x5410);
  if (!is_signed) return places;
  const uint32_t negative = __byte_perm(signs(x[0], x[1]), signs(x[2], x[3]), 0x5410);
  const uint32_t low = (places - ((places & negative & 0x80808080u) >> 7)) ^ 0x7f7f7f7fu;
  return (low & negative) | ((places + 0x7f7f7f7fu) & ~negative);
}

// New codes and scale of a warp's 256 numbers.
template <bool is_signed>
__device__ inline void encode(const codes::Cells<is_signed>& cells, float (&x)[EACH], uint32_t (&packed)[2],
                              float* scale) {
  // As bits, numbers >= 0 are in the same order, any NaN above all.
  uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < EACH; ++k) bits = max(bits, __float_as_uint(fabsf(x[k])));
  const float most = __uint_as_float(__reduce_max_sync(0xffffffffu, bits));
  // x / scale by multiplications, which is the same but for the rounding. 1 / scale must not be infinite.
  float inverse = 1.0f;
  if (most < 1e-30f) {
#pragma unroll
    for (int k = 0; k < EACH; ++k) x[k] = __fmul_rn(x[k], 0x1p64f);
    if (most > 0.0f) inverse = __frcp_rn(__fmul_rn(most, 0x1p64f));
  } else if (most <= 0x1.fffffep127f) {
    inverse = __frcp_rn(most);
  } else {
    // Infinite or a NaN: every NaN has the last code.
    const float factor = most > 0.0f ? 0.0f : 1.0f;
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const float product = __fmul_rn(x[k], factor);
      x[k] = product == product ? fminf(fmaxf(product, -1.0f), 1.0f) : 1.0f;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t places[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) places[k] = place_of(cells, __fmul_rn(x[half * 4 + k], inverse));
    packed[half] = pack<is_signed>(places, x + half * 4);
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
    m[k] = __fmul_rn(lookup.first[m_codes[k / 4] >> (8 * (k % 4)) & 0xffu], m_scale);
    v[k] = __fmul_rn(lookup.second[v_codes[k / 4] >> (8 * (k % 4)) & 0xffu], v_scale);
  }
  adamw_elements(step, t.keep, scale, g, p, m, v);
  if constexpr (!fits) {
#pragma unroll
    for (int k = 0; k < EACH; ++k)
      if (k / 4 * 128 + lane * 4 + k % 4 >= count) m[k] = v[k] = 0.0f;
  }
  encode(lookup.first_cells, m, m_codes, t.exp_avg_scale + at / codes::BLOCK);
  encode(lookup.second_cells, v, v_codes, t.exp_avg_sq_scale + at / codes::BLOCK);
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

__global__ void __launch_bounds__(THREADS, RESIDENT) adamw_8bit_kernel(const __grid_constant__ Table table) {
  __shared__ Lookup lookup;
  static_assert(sizeof(Lookup) % 16 == 0);
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(Lookup) / 16); i += THREADS)
    reinterpret_cast<uint4*>(&lookup)[i] = reinterpret_cast<const uint4*>(&lookup_table)[i];
  __syncthreads();
  const float scale = *table.step.scale;
  const int chunks = table.chunks();
  for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int low = table.holder(chunk);
    const AdamW8bitTensor& t = table.tensors[low];
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
}

}  // namespace

int adamw_8bit(const AdamW8bitTensor* tensors, int64_t count, const AdamWStep& step, Stream stream) {
  Table table;
  table.step = step;
  for (int64_t at = 0; at < count;) {
    at = table.fill(tensors, at, count, CHUNK);
    if (table.count == 0) break;
    const int blocks = std::min(table.chunks(), multiprocessors() * RESIDENT);
    adamw_8bit_kernel<<<blocks, THREADS, 0, stream>>>(table);
    const int error = launched();
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace megatune::cuda
