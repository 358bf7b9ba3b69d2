// What both directions of rope_qk share: the weights of the norm, fetching ahead, checks of a packed product.
#pragma once

#include "../common/reduce.cuh"
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

// Fetching ahead, for heads with a norm that are turned whole, of which a lane has one pair of vectors: what a thread
// computes next is on its way to places of its own in shared memory meanwhile, more of it than registers could hold.
// STAGES: of some heads each, one of them being computed.
constexpr int STAGES = 2;

__device__ inline void fetch(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(__cvta_generic_to_global(from))
               : "memory");
}

// By way of the first cache: for what threads of several heads read.
template <int BYTES>
__device__ inline void fetch_shared(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(__cvta_generic_to_global(from)), "n"(BYTES)
               : "memory");
}

__device__ inline void end_stage() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all stages but the last STAGES - 1.
__device__ inline void await_stage() { asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory"); }

// 16-byte vectors that hold the angles of N columns.
template <int N>
constexpr int ANGLE_VECTORS = N / 2;

// The angles of a token at N columns; place i of a thread is at to[i * threads].
template <int N>
__device__ inline void fetch_angles(int4* to, int threads, const Angles& angles, int64_t token, int64_t column) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    const int64_t at = token * angles.half + column + 4 * i;
    fetch_shared<16>(to + i * threads, angles.cos + at);
    fetch_shared<16>(to + (N / 4 + i) * threads, angles.sin + at);
  }
}

template <int N>
__device__ inline Turn<N> fetched_turn(const int4* from, int threads, float sign) {
  Turn<N> turn;
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    memcpy(turn.cos.at + 4 * i, from + i * threads, 16);
    memcpy(turn.sin.at + 4 * i, from + (N / 4 + i) * threads, 16);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) turn.sin.at[i] *= sign;
  return turn;
}

inline bool in_steps(const Packed& packed, int64_t half, int64_t step) {
  return half % step == 0 && packed.width % step == 0 && packed.token_stride % step == 0 &&
         packed.group_stride % step == 0 && packed.head_stride % step == 0;
}

inline bool too_many(const Packed& packed) {
  return packed.tokens * packed.groups > UINT32_MAX || packed.queries > INT32_MAX - 2;
}

}  // namespace megatune::cuda
