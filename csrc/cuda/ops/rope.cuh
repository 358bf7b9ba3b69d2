// Heads turned by the angles of their tokens: what the kernels of both directions share.
//
// A head is shared by some lanes of a warp, of which each has the pairs of columns (c, half + c) for c in steps of
// lanes * N: rotation is within it. A warp has the same head of several items (an item: a group of heads of a token),
// so that it never parts at what is to be done with a head, and each thread asks for EACH heads before it writes any.
#pragma once

#include "../common/launch.cuh"
#include "../common/vec.cuh"

namespace megatune::cuda {

constexpr int TURN_WARPS = 8;  // of a block

// What is read or written once: nothing of it is to stay in the caches.
template <int N, class T>
__device__ inline Vec<T, N> load_once(const T* from) {
  if constexpr (sizeof(Vec<T, N>) == 16) {
    const int4 words = __ldcs(reinterpret_cast<const int4*>(from));
    Vec<T, N> values;
    memcpy(&values, &words, sizeof values);
    return values;
  } else {
    return load<N>(from);
  }
}

template <class T, int N>
__device__ inline void store_once(T* to, const Vec<T, N>& values) {
  if constexpr (sizeof(values) == 16) {
    int4 words;
    memcpy(&words, &values, sizeof words);
    __stcs(reinterpret_cast<int4*>(to), words);
  } else {
    store_whole(to, values);
  }
}

// The angles of tokens, [tokens, half].
struct Angles {
  const float* cos;
  const float* sin;
  int64_t half;
  float sign;  // -1: turned back
};

template <int N>
struct Turn {
  Vec<float, N> cos, sin;
};

template <int N>
__device__ inline Turn<N> turn_at(const Angles& angles, int64_t token, int64_t column) {
  Turn<N> turn{load_any<N>(angles.cos, Type::f32, token * angles.half + column),
               load_any<N>(angles.sin, Type::f32, token * angles.half + column)};
#pragma unroll
  for (int i = 0; i < N; ++i) turn.sin.at[i] *= angles.sign;
  return turn;
}

template <int N>
__device__ inline void turn_pairs(const Turn<N>& turn, Vec<float, N>& one, Vec<float, N>& two) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float low = one.at[i] * turn.cos.at[i] - two.at[i] * turn.sin.at[i];
    two.at[i] = two.at[i] * turn.cos.at[i] + one.at[i] * turn.sin.at[i];
    one.at[i] = low;
  }
}

// The heads of a group that are turned: queries, then the key.
template <class T>
struct Parted {
  const T *q, *k;
  int64_t q_token_stride, q_group_stride, q_head_stride, k_token_stride, k_group_stride;
  T *turned_q, *turned_k;
  int64_t width;
  uint32_t groups;
  int queries, heads;

  __device__ const T* from(int64_t token, int64_t group, int64_t head) const {
    return head < queries ? q + token * q_token_stride + group * q_group_stride + head * q_head_stride
                          : k + token * k_token_stride + group * k_group_stride;
  }
  __device__ T* to(int64_t item, int64_t head) const {
    return head < queries ? turned_q + (item * queries + head) * width : turned_k + item * width;
  }
  __device__ bool copies(int) const { return false; }
};

template <class T>
Parted<T> parted(const Rope& args) {
  const int queries = static_cast<int>(args.queries);
  return {static_cast<const T*>(args.q), static_cast<const T*>(args.k),
          args.q_strides[0], args.q_strides[1], args.q_strides[2], args.k_strides[0], args.k_strides[1],
          static_cast<T*>(args.turned_q), static_cast<T*>(args.turned_k),
          args.width, static_cast<uint32_t>(args.groups), queries, queries + 1};
}

// threadIdx.x: columns, .y: items, .z: heads. `route` says where the heads of an item are: `heads` of them, of `groups`
// groups of a token, read at from(token, group, head) and written to to(item, head); those of which copies(head) is
// true are not turned.
template <class T, int N, int EACH, class Route>
__global__ void __launch_bounds__(TURN_WARPS * 32) turn_kernel(const Route route, const Angles angles, int64_t items,
                                                               int64_t width) {
  const int64_t half = angles.half, own = static_cast<int64_t>(threadIdx.x) * N, step = blockDim.x * N;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; item < items;
       item += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const uint32_t token = static_cast<uint32_t>(item) / route.groups;
    const uint32_t group = static_cast<uint32_t>(item) % route.groups;
    for (int64_t column = own; column < half; column += step) {
      const auto turn = turn_at<N>(angles, token, column);
      for (int begin = threadIdx.z; begin < route.heads; begin += blockDim.z * EACH) {
        Vec<T, N> first[EACH], second[EACH];
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
          const int head = begin + i * blockDim.z;
          if (head >= route.heads) continue;
          const T* from = route.from(token, group, head) + column;
          first[i] = load_once<N>(from), second[i] = load_once<N>(from + half);
        }
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
          const int head = begin + i * blockDim.z;
          if (head >= route.heads) continue;
          if (!route.copies(head)) {
            auto one = widen(first[i]), two = widen(second[i]);
            turn_pairs(turn, one, two);
            first[i] = narrow<T>(one), second[i] = narrow<T>(two);
          }
          T* to = route.to(item, head) + column;
          store_once(to, first[i]), store_once(to + half, second[i]);
        }
      }
    }
    // What is beyond the turned columns passes through.
    for (int64_t column = 2 * half + own; column < width; column += step) {
      for (int head = threadIdx.z; head < route.heads; head += blockDim.z)
        store_once(route.to(item, head) + column, load_once<N>(route.from(token, group, head) + column));
    }
  }
}

inline unsigned power_of_two(int64_t value, unsigned most) {
  unsigned result = 1;
  while (result < most && result < value) result *= 2;
  return result;
}

// Lanes of a head, items of a block, heads at a time; whole warps, so many if they are enough for the heads.
inline dim3 turn_block(int64_t half, int64_t width, int64_t heads, int elements, int each,
                       unsigned warps = TURN_WARPS) {
  const int64_t pairs = std::max<int64_t>(half, width - 2 * half) / elements;
  const unsigned lanes = power_of_two(pairs, 32);
  const unsigned rows = static_cast<unsigned>(std::min<int64_t>((heads + each - 1) / each, TURN_WARPS));
  return dim3(lanes, 32 / lanes * std::max(warps / rows, 1u), rows);
}

}  // namespace megatune::cuda
