// Queries and keys of a packed q, k, v product: norm of each head if asked for, rotation and separation in one pass.

#include "rope_qk.cuh"

namespace megatune::cuda {

namespace {

constexpr int EACH_NORMED = 3;  // heads that a thread has on their way
constexpr int BLOCKS_NORM = 3;  // of a multiprocessor, of the most threads
constexpr int NORM_WARPS = 3;   // of a block; several small blocks end one by one

// Calls pair(column) for the pairs of columns that a lane has after its first, then single(column) for what is beyond
// both halves.
template <int N, class Pair, class Single>
__device__ inline void far_columns(int64_t half, int64_t width, Pair&& pair, Single&& single) {
  const int64_t own = static_cast<int64_t>(threadIdx.x) * N, step = blockDim.x * N;
#pragma unroll 1
  for (int64_t column = own + step; column < half; column += step) pair(column);
#pragma unroll 1
  for (int64_t column = 2 * half + own; column < width; column += step) single(column);
}

template <int N>
__device__ inline float squares(const Vec<float, N>& x) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) sum += x.at[i] * x.at[i];
  return sum;
}

template <class T, int N>
__device__ inline Vec<float, N> scaled(Vec<float, N> x, float rstd, bool round_first) {
#pragma unroll
  for (int i = 0; i < N; ++i) x.at[i] *= rstd;
  return round_first ? widen(narrow<T>(x)) : x;
}

template <int N>
__device__ inline Vec<float, N> times(Vec<float, N> x, const Vec<float, N>& factor) {
#pragma unroll
  for (int i = 0; i < N; ++i) x.at[i] *= factor.at[i];
  return x;
}

// Heads of any kind; threads as in turn_kernel. A lane keeps its first pair of columns, what it has more is read twice,
// the second time from the cache.
template <class T, int N>
__global__ void __launch_bounds__(THREADS) any_norm_kernel(const Parted<T> route, const Angles angles,
                                                           const Weights weights, int64_t items, float eps,
                                                           bool round_first, float* rstds) {
  const int64_t half = angles.half, width = route.width, own = static_cast<int64_t>(threadIdx.x) * N;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool here = item < items, kept = here && own < half;
  const uint32_t token = static_cast<uint32_t>(item) / route.groups;
  const uint32_t group = static_cast<uint32_t>(item) % route.groups;
  Turn<N> turn{};
  if (kept) turn = turn_at<N>(angles, token, own);
  // All lanes of a warp go through together: they add up.
  for (int head = threadIdx.z; head < route.heads; head += blockDim.z) {
    const T* from = route.from(token, group, head);
    Vec<T, N> first{}, second{};
    if (kept) first = load<N>(from + own), second = load<N>(from + half + own);
    float total = squares(widen(first)) + squares(widen(second));
    const auto add = [&](int64_t column) { total += squares(widen(load<N>(from + column))); };
    if (here) far_columns<N>(half, width, [&](int64_t column) { add(column), add(half + column); }, add);
    total = head_sum(total, blockDim.x);
    if (!here) continue;
    const bool key = head == route.queries;
    const float rstd = rsqrtf(total / static_cast<float>(width) + eps);
    if (threadIdx.x == 0) rstds[item * route.heads + head] = rstd;
    const auto entered = [&](const Vec<T, N>& x, int64_t column) {
      return times(scaled<T>(widen(x), rstd, round_first), weights.at<N>(key, column));
    };
    T* to = route.to(item, head);
    const auto write = [&](const Turn<N>& by, int64_t column, const Vec<T, N>& low, const Vec<T, N>& high) {
      auto one = entered(low, column), two = entered(high, half + column);
      turn_pairs(by, one, two);
      store_once(to + column, narrow<T>(one)), store_once(to + half + column, narrow<T>(two));
    };
    if (kept) write(turn, own, first, second);
    far_columns<N>(
        half, width,
        [&](int64_t column) {
          write(turn_at<N>(angles, token, column), column, load<N>(from + column), load<N>(from + half + column));
        },
        [&](int64_t column) { store_once(to + column, narrow<T>(entered(load<N>(from + column), column))); });
  }
}

// Heads that are turned whole, of which a lane has one pair of vectors; threads as in turn_kernel.
template <class T>
__global__ void __launch_bounds__(THREADS, BLOCKS_NORM) norm_kernel(const Parted<T> route, const Angles angles,
                                                                    const Weights weights, int64_t items, float eps,
                                                                    bool round_first, float* rstds) {
  constexpr int N = 16 / sizeof(T), EACH = EACH_NORMED;
  let_next_begin();
  wait_for_previous();
  extern __shared__ float factors[];  // of queries, of keys: [2, width]
  const int half = static_cast<int>(angles.half), width = 2 * half, column = threadIdx.x * N;
  const int heads = route.heads, step = blockDim.z;
  const float share = 1.0f / static_cast<float>(width);
  const int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool here = item < items && column < half;
  const uint32_t token = static_cast<uint32_t>(item) / route.groups;
  const uint32_t group = static_cast<uint32_t>(item) % route.groups;
  const int threads = blockDim.x * blockDim.y * step;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  for (int at = thread * N; at < 2 * width; at += threads * N)
    store(factors + at, weights.at<N>(at >= width, at >= width ? at - width : at));
  __syncthreads();
  // All lanes of a warp go through together: they add up.
#pragma unroll 1
  for (int begin = threadIdx.z; begin < heads; begin += step * EACH) {
    Turn<N> turn{};
    Vec<T, N> low[EACH]{}, high[EACH]{};
    const T* x = route.from(token, group, 0) + column;
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const int head = begin + e * step;
      if (!here || head >= heads) continue;
      const T* from = x + head * route.q_head_stride;  // also the key, which stands behind the queries
      low[e] = load_once<N>(from), high[e] = load_once<N>(from + half);
    }
    if (here) turn = turn_at<N>(angles, token, column);
    T* const q = route.turned_q + item * route.queries * width + column;
    float* const rstd_of = rstds + item * heads;
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const int head = begin + e * step;
      if (head >= heads) continue;  // the same for all lanes
      auto one = widen(low[e]), two = widen(high[e]);
      const float total = head_sum(squares(one) + squares(two), blockDim.x);
      if (!here) continue;
      const float rstd = rsqrtf(total * share + eps);
      if (threadIdx.x == 0) rstd_of[head] = rstd;
      const bool key = head == route.queries;
      one = scaled<T>(one, rstd, round_first), two = scaled<T>(two, rstd, round_first);
      const float* factor = factors + (key ? width : 0) + column;
      one = times(one, load<N>(factor)), two = times(two, load<N>(factor + half));
      turn_pairs(turn, one, two);
      T* to = key ? route.turned_k + item * width + column : q + static_cast<int64_t>(head) * width;
      store_once(to, narrow<T>(one)), store_once(to + half, narrow<T>(two));
    }
  }
}

const void* at(Type type, const void* data, int64_t index) {
  return static_cast<const char*>(data) + index * (type == Type::f32 ? 4 : 2);
}

}  // namespace

int rope_qk(const RopeQk& args, Stream stream) {
  const Packed& packed = args.packed;
  const void* k = at(args.type, args.qkv, packed.queries * packed.head_stride);
  const Rope turned{args.type,
                    args.qkv,
                    k,
                    packed.tokens,
                    packed.groups,
                    packed.queries,
                    packed.width,
                    {packed.token_stride, packed.group_stride, packed.head_stride},
                    {packed.token_stride, packed.group_stride},
                    args.cos,
                    args.sin,
                    args.half,
                    false,
                    args.q,
                    args.k};
  if (args.q_weight == nullptr) return rope(turned, stream);
  const int64_t items = packed.tokens * packed.groups;
  if (items == 0 || packed.width == 0) return 0;
  if (too_many(packed)) return static_cast<int>(cudaErrorInvalidValue);
  return with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    const bool vectors = in_steps(packed, args.half, N) &&
                         aligned({args.qkv, args.cos, args.sin, args.q_weight, args.k_weight, args.q, args.k});
    const Parted<T> route = parted<T>(turned);
    const Angles angles{args.cos, args.sin, args.half, 1.0f};
    const Weights weights{args.q_weight, args.k_weight, args.weight_type, args.offset};
    const auto block_of = [&](unsigned warps) {
      return turn_block(args.half, packed.width, route.heads, vectors ? N : 1, EACH_NORMED, warps);
    };
    dim3 block = block_of(NORM_WARPS);
    if (vectors && 2 * args.half == packed.width && args.half <= block.x * N)
      return launch_early(norm_kernel<T>, grid(items, block.y), block, 2 * sizeof(float) * packed.width, stream, route,
                          angles, weights, items, args.eps, args.round_first, args.rstd);
    block = block_of(TURN_WARPS);
    const auto kernel = vectors ? any_norm_kernel<T, N> : any_norm_kernel<T, 1>;
    kernel<<<grid(items, block.y), block, 0, stream>>>(route, angles, weights, items, args.eps, args.round_first,
                                                       args.rstd);
    return launched();
  });
}

}  // namespace megatune::cuda
