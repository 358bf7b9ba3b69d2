// Sums over the threads that share a row, always in the same order.
#pragma once

namespace megatune::cuda {

// Sum over the `threads` of a row, given to all of them. threads: a power of two up to 32 (neighbouring lanes of a
// warp; every lane of it must call), or all threads of the block, a multiple of 32. shared: 32 floats.
// FREE: nobody can still be reading `shared` (who alternates between two of them: the sum in between has a barrier).
template <bool FREE = false>
__device__ inline float row_sum(float value, int threads, float* shared) {
  for (int lane = min(threads, 32) / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
  if (threads <= 32) return value;
  const int lane = threadIdx.x % 32, warps = threads / 32;
  if constexpr (!FREE) __syncthreads();  // everyone has read the sum before this one
  if (lane == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = lane < warps ? shared[lane] : 0.0f;
#pragma unroll
  for (int other = 16; other > 0; other /= 2) value += __shfl_xor_sync(0xffffffffu, value, other);
  return value;
}

}  // namespace megatune::cuda
