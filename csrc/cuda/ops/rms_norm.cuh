// What both directions of the root-mean-square norm share.
#pragma once

#include "../common/vec.cuh"

#include <algorithm>

namespace megatune::cuda {

constexpr int SHORT_THREADS = 256;  // of a block that has several short rows

// Where rows begin: of two dimensions at most and fewer than 2^31, else `inner` is 0. The division is a product
// (Granlund and Montgomery, PLDI 1994).
struct Starts {
  int64_t outer_stride, inner_stride;
  uint32_t inner, multiplier, shift;

  __device__ int64_t operator()(uint32_t row) const {
    const uint32_t outer = (__umulhi(multiplier, row) + row) >> shift;
    return outer * outer_stride + (row - outer * inner) * inner_stride;
  }
};

// Of rows that are collapsed.
inline Starts starts_of(const Rows& rows) {
  if (rows.size[2] != 1 || count(rows) > 0x7fffffff) return {};
  const uint64_t inner = static_cast<uint64_t>(rows.size[1]);
  uint32_t shift = 0;
  while ((uint64_t{1} << shift) < inner) ++shift;
  const uint64_t multiplier = ((uint64_t{1} << 32) * ((uint64_t{1} << shift) - inner)) / inner + 1;
  return {rows.stride[0], rows.stride[1], static_cast<uint32_t>(inner), static_cast<uint32_t>(multiplier), shift};
}

// Sum over the threads of a row, given to all of them, always in the same order. threads: a power of two up to 32
// (neighbouring lanes of a warp; every lane of it must call), or a multiple of 32. shared: 32 floats, in which nobody
// can still be reading. GROUPS: blockDim.y groups of a block add up by themselves, with barriers 1 to 15; else all
// threads of the block do. (A kernel that names barriers takes 16 of a multiprocessor's 64: at most four blocks of it
// are at work there.)
template <bool GROUPS>
__device__ inline float sum_of_row(float value, int threads, float* shared) {
  for (int lane = min(threads, 32) / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
  if (threads <= 32) return value;
  const int lane = threadIdx.x % 32, warps = threads / 32;
  if (lane == 0) shared[threadIdx.x / 32] = value;
  if constexpr (GROUPS) {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + threadIdx.y), "r"(threads) : "memory");
  } else {
    __syncthreads();
  }
  const int most = warps <= 8 ? 8 : 32, mine = lane % most;
  value = mine < warps ? shared[mine] : 0.0f;
  if (most == 32) {
    value += __shfl_xor_sync(0xffffffffu, value, 16);
    value += __shfl_xor_sync(0xffffffffu, value, 8);
  }
#pragma unroll
  for (int other = 4; other > 0; other /= 2) value += __shfl_xor_sync(0xffffffffu, value, other);
  return value;
}

// For `kept` vectors a thread. few: of a short row as few threads as can keep it, not as many as it has vectors.
inline dim3 block_of(int64_t vectors, int kept, int most, bool few = false, int of_short = SHORT_THREADS) {
  if (vectors <= 32 * kept) {
    unsigned lanes = 1;
    while (lanes < 32 && lanes * (few ? kept : 1) < vectors) lanes *= 2;
    return dim3(lanes, of_short / lanes);
  }
  return dim3(static_cast<unsigned>(std::min<int64_t>((vectors + kept * 32 - 1) / (kept * 32) * 32, most)));
}

}  // namespace megatune::cuda
