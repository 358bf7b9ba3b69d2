// What both directions of rope_qk share: the weights of the norm, sums over a head, checks of a packed product.
#pragma once

#include "../common/dependent.cuh"
#include "megatune/cuda_tokens.h"
#include "rope.cuh"

namespace megatune::cuda {

constexpr int THREADS = TURN_WARPS * 32;

// What a head is normalised by: of its kind.
struct Weights {
  const void* q;
  const void* k;
  Type type;
  float offset;

  template <int N>
  __device__ Vec<float, N> at(bool key, int64_t column) const {
    Vec<float, N> factor = load_any<N>(key ? k : q, type, column);
#pragma unroll
    for (int i = 0; i < N; ++i) factor.at[i] += offset;
    return factor;
  }
};

// Sum over the lanes of a head, a power of two of them, given to all. Every lane of the warp must call.
__device__ inline float head_sum(float value, int lanes) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, value, lane);
    if (lane < lanes) value += other;  // rather than a loop of them: no branch
  }
  return value;
}

inline bool in_steps(const Packed& packed, int64_t half, int64_t step) {
  return half % step == 0 && packed.width % step == 0 && packed.token_stride % step == 0 &&
         packed.group_stride % step == 0 && packed.head_stride % step == 0;
}

inline bool too_many(const Packed& packed) {
  return packed.tokens * packed.groups > UINT32_MAX || packed.queries > INT32_MAX - 2;
}

}  // namespace megatune::cuda
