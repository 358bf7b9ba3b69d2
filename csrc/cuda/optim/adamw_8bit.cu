// AdamW with moments in 8 bits (arXiv:2110.02861) over many tensors in one launch (batch.cuh): a warp has a block of
// 256 elements in its registers, from the old codes to the new ones, and the next block on its way there.

#include "elements.cuh"
#include "megatune/codes.h"

namespace megatune::cuda {
namespace {

constexpr int THREADS = 640;  // a multiprocessor has one such block: as many warps as have room for two blocks each
constexpr int WARPS = THREADS / 32;
// A warp's blocks in line: it stores their new scales together, as 32 bytes. In four bytes at a time, into sectors that
// other warps write too, they would take a tenth of the time.
constexpr int SPAN = 8;
constexpr int CHUNK = SPAN * codes::BLOCK;  // elements
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

// New codes of a warp's 256 numbers; their scale is returned.
template <bool is_signed>
__device__ inline float encode(const codes::Cells<is_signed>& cells, float (&x)[EACH], uint32_t (&packed)[2]) {
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
  return most;
}

// A lane's elements of a block of 256, as they are in memory.
struct Loaded {
  float4 master[2];
  uint4 grad[2];  // of bf16 the first two words
  uint32_t exp_avg[2], exp_avg_sq[2];
  float exp_avg_scale, exp_avg_sq_scale;  // lane i: of the chunk's block i
};

struct Numbers {
  float p[EACH], m[EACH], v[EACH], g[EACH];
};

__device__ inline int place_of_half(int half) { return half * 128 + static_cast<int>(threadIdx.x % 32) * 4; }

// How many blocks of a chunk, from block `first` of the tensor on, are whole and can be loaded and stored in fours.
__device__ inline int whole_blocks(const AdamW8bitTensor& t, int first) {
  if (!at_16_bytes(t.master, t.exp_avg, t.exp_avg_sq, t.grad, t.weight)) return 0;
  return static_cast<int>(min(t.n / codes::BLOCK - first, static_cast<int64_t>(SPAN)));
}

__device__ inline void load_block(const AdamW8bitTensor& t, int64_t at, Loaded& block) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t i = at + place_of_half(half);
    block.master[half] = *reinterpret_cast<const float4*>(t.master + i);
    if (t.low_grad) {
      const uint2 pairs = *reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(t.grad) + i);
      block.grad[half].x = pairs.x, block.grad[half].y = pairs.y;
    } else {
      block.grad[half] = *reinterpret_cast<const uint4*>(static_cast<const float*>(t.grad) + i);
    }
    block.exp_avg[half] = *reinterpret_cast<const uint32_t*>(t.exp_avg + i);
    block.exp_avg_sq[half] = *reinterpret_cast<const uint32_t*>(t.exp_avg_sq + i);
  }
}

// The chunk's block i, which is loaded.
__device__ inline void decode(const Loaded& block, int i, bool low_grad, const Lookup& lookup, Numbers& x) {
  const float m_scale = __shfl_sync(0xffffffffu, block.exp_avg_scale, i);
  const float v_scale = __shfl_sync(0xffffffffu, block.exp_avg_sq_scale, i);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 master = block.master[half];
    const uint4 bits = block.grad[half];
    float* p = x.p + half * 4;
    float* g = x.g + half * 4;
    p[0] = master.x, p[1] = master.y, p[2] = master.z, p[3] = master.w;
    if (low_grad) {
      g[0] = __uint_as_float(bits.x << 16), g[1] = __uint_as_float(bits.x & 0xffff0000u);
      g[2] = __uint_as_float(bits.y << 16), g[3] = __uint_as_float(bits.y & 0xffff0000u);
    } else {
      g[0] = __uint_as_float(bits.x), g[1] = __uint_as_float(bits.y);
      g[2] = __uint_as_float(bits.z), g[3] = __uint_as_float(bits.w);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      x.m[half * 4 + k] = __fmul_rn(lookup.first[block.exp_avg[half] >> (8 * k) & 0xffu], m_scale);
      x.v[half * 4 + k] = __fmul_rn(lookup.second[block.exp_avg_sq[half] >> (8 * k) & 0xffu], v_scale);
    }
  }
}

__device__ inline void update_whole(const AdamW8bitTensor& t, const AdamWStep& step, const Lookup& lookup, float scale,
                                    int64_t at, Numbers& x, float* new_m_scale, float* new_v_scale) {
  adamw_elements(step, t.keep, scale, x.g, x.p, x.m, x.v);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t i = at + place_of_half(half);
    const float4 four = make_float4(x.p[half * 4], x.p[half * 4 + 1], x.p[half * 4 + 2], x.p[half * 4 + 3]);
    *reinterpret_cast<float4*>(t.master + i) = four;
    store_weight(t, i, four);
  }
  uint32_t m_codes[2], v_codes[2];
  const float m_scale = encode(lookup.first_cells, x.m, m_codes);
  const float v_scale = encode(lookup.second_cells, x.v, v_codes);
  if (threadIdx.x % 32 == 0) *new_m_scale = m_scale, *new_v_scale = v_scale;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t i = at + place_of_half(half);
    *reinterpret_cast<uint32_t*>(t.exp_avg + i) = m_codes[half];
    *reinterpret_cast<uint32_t*>(t.exp_avg_sq + i) = v_codes[half];
  }
}

// A block that ends early, or whose elements cannot be loaded and stored in fours: one by one.
__device__ inline void update_some(const AdamW8bitTensor& t, const AdamWStep& step, const Lookup& lookup, float scale,
                                   int64_t at) {
  const int count = static_cast<int>(min(t.n - at, static_cast<int64_t>(codes::BLOCK)));
  const float m_scale = t.exp_avg_scale[at / codes::BLOCK], v_scale = t.exp_avg_sq_scale[at / codes::BLOCK];
  Numbers x;
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const int from = place_of_half(k / 4) + k % 4;
    const bool is_there = from < count;
    const int64_t i = at + from;
    x.p[k] = is_there ? t.master[i] : 0.0f;
    x.g[k] = is_there ? load_grad_one(t, i) : 0.0f;
    x.m[k] = is_there ? __fmul_rn(lookup.first[t.exp_avg[i]], m_scale) : 0.0f;
    x.v[k] = is_there ? __fmul_rn(lookup.second[t.exp_avg_sq[i]], v_scale) : 0.0f;
  }
  adamw_elements(step, t.keep, scale, x.g, x.p, x.m, x.v);
  uint32_t m_codes[2], v_codes[2];
  const float m_new = encode(lookup.first_cells, x.m, m_codes);
  const float v_new = encode(lookup.second_cells, x.v, v_codes);
  if (threadIdx.x % 32 == 0) t.exp_avg_scale[at / codes::BLOCK] = m_new, t.exp_avg_sq_scale[at / codes::BLOCK] = v_new;
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const int from = place_of_half(k / 4) + k % 4;
    if (from >= count) continue;
    const int64_t i = at + from;
    t.master[i] = x.p[k];
    t.exp_avg[i] = static_cast<uint8_t>(m_codes[k / 4] >> (8 * (k % 4)));
    t.exp_avg_sq[i] = static_cast<uint8_t>(v_codes[k / 4] >> (8 * (k % 4)));
    store_weight_one(t, i, x.p[k]);
  }
}

__global__ void __launch_bounds__(THREADS, 1) adamw_8bit_kernel(const __grid_constant__ Table table) {
  __shared__ Lookup lookup;
  __shared__ float new_m_scale[WARPS][SPAN], new_v_scale[WARPS][SPAN];
  static_assert(sizeof(Lookup) % 16 == 0);
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(Lookup) / 16); i += THREADS)
    reinterpret_cast<uint4*>(&lookup)[i] = reinterpret_cast<const uint4*>(&lookup_table)[i];
  __syncthreads();
  const float scale = *table.step.scale;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int stride = static_cast<int>(gridDim.x) * WARPS;
  Loaded block{};
  int next = 0, next_whole = 0;  // the chunk that is loaded: its tensor and how many of its blocks are whole
  const auto load_chunk = [&](int chunk) {
    next_whole = 0;
    if (chunk >= table.chunks()) return;
    while (next + 1 < table.count && table.first[next + 1] <= chunk) ++next;
    const AdamW8bitTensor& t = table.tensors[next];
    const int first = (chunk - table.first[next]) * SPAN;
    next_whole = whole_blocks(t, first);
    if (next_whole == 0) return;
    load_block(t, static_cast<int64_t>(first) * codes::BLOCK, block);
    if (lane < next_whole) {
      block.exp_avg_scale = t.exp_avg_scale[first + lane];
      block.exp_avg_sq_scale = t.exp_avg_sq_scale[first + lane];
    }
  };
  int chunk = warp * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
  load_chunk(chunk);
  for (; chunk < table.chunks(); chunk += stride) {
    const AdamW8bitTensor& t = table.tensors[next];
    const int first = (chunk - table.first[next]) * SPAN, whole = next_whole;
    const int64_t left = (t.n + codes::BLOCK - 1) / codes::BLOCK - first;
    const int blocks = static_cast<int>(min(left, static_cast<int64_t>(SPAN)));
#pragma unroll 1
    for (int i = 0; i < blocks; ++i) {
      const int64_t at = static_cast<int64_t>(first + i) * codes::BLOCK;
      Numbers x;
      decode(block, i, t.low_grad, lookup, x);
      if (i + 1 < whole) {
        load_block(t, at + codes::BLOCK, block);
      } else if (i + 1 == blocks) {
        load_chunk(chunk + stride);
      }
      if (i < whole) {
        update_whole(t, table.step, lookup, scale, at, x, &new_m_scale[warp][i], &new_v_scale[warp][i]);
      } else {
        update_some(t, table.step, lookup, scale, at);
      }
    }
    __syncwarp();
    if (lane < whole) {
      t.exp_avg_scale[first + lane] = new_m_scale[warp][lane];
      t.exp_avg_sq_scale[first + lane] = new_v_scale[warp][lane];
    }
    __syncwarp();
  }
}

}  // namespace

int adamw_8bit(const AdamW8bitTensor* tensors, int64_t count, const AdamWStep& step, Stream stream) {
  Table table;
  table.step = step;
  for (int64_t at = 0; at < count;) {
    at = table.fill(tensors, at, count, CHUNK);
    if (table.count == 0) break;
    const int blocks = std::min(table.chunks(), multiprocessors());
    adamw_8bit_kernel<<<blocks, THREADS, 0, stream>>>(table);
    const int error = launched();
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace megatune::cuda
