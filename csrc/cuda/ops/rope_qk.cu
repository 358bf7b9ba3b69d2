// Queries and keys of a packed q, k, v product: norm of each head if asked for, rotation and separation in one pass.

#include "rope_qk.cuh"

namespace megatune::cuda {

namespace {

constexpr int EACH_NORMED = 3;  // heads that a thread has on their way
constexpr int BLOCKS_NORM = 2;  // of a multiprocessor: with three, or more in turn, it was slower

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
__device__ inline Vec<float, N> normalised(Vec<float, N> x, float rstd, const Vec<float, N>& factor, bool round_first) {
#pragma unroll
  for (int i = 0; i < N; ++i) x.at[i] *= rstd;
  if (round_first) x = widen(narrow<T>(x));
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
    total = row_sum(total, blockDim.x, nullptr);
    if (!here) continue;
    const bool key = head == route.queries;
    const float rstd = rsqrtf(total / static_cast<float>(width) + eps);
    if (threadIdx.x == 0) rstds[item * route.heads + head] = rstd;
    const auto entered = [&](const Vec<T, N>& x, int64_t column) {
      return normalised<T>(widen(x), rstd, weights.at<N>(key, column), round_first);
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

// Fetching ahead (rope_qk.cuh); threads as in turn_kernel, of which each goes on with the items after its first.
template <class T>
__global__ void __launch_bounds__(THREADS, BLOCKS_NORM) norm_kernel(const Parted<T> route, const Angles angles,
                                                                    const Weights weights, int64_t items, float eps,
                                                                    bool round_first, float* rstds) {
  constexpr int N = 16 / sizeof(T), EACH = EACH_NORMED, VECTORS = EACH * 2 + ANGLE_VECTORS<N>;
  extern __shared__ int4 stages[];  // [STAGES][VECTORS][threads], then the factors of queries and keys, [2, width]
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int64_t half = angles.half, width = route.width, column = static_cast<int64_t>(threadIdx.x) * N;
  const bool has = column < half;
  float* factors = reinterpret_cast<float*>(stages + STAGES * VECTORS * threads);
  for (int64_t at = static_cast<int64_t>(thread) * N; at < 2 * width; at += threads * N)
    store(factors + at, weights.at<N>(at >= width, at >= width ? at - width : at));
  __syncthreads();

  const int64_t item_step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  int64_t next_item = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  int next_head = threadIdx.z, next_stage = 0;
  const int step = blockDim.z;
  const auto fetch_next = [&] {
    if (has && next_item < items) {
      const uint32_t token = static_cast<uint32_t>(next_item) / route.groups;
      const uint32_t group = static_cast<uint32_t>(next_item) % route.groups;
      int4* to = stages + next_stage * VECTORS * threads + thread;
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        const int head = next_head + e * step;
        if (head >= route.heads) continue;
        const T* x = route.from(token, group, head) + column;
        fetch(to + 2 * e * threads, x), fetch(to + (2 * e + 1) * threads, x + half);
      }
      fetch_angles<N>(to + 2 * EACH * threads, threads, angles, token, column);
    }
    end_stage();
    next_head += step * EACH;
    if (next_head >= route.heads) next_head = threadIdx.z, next_item += item_step;
    next_stage = (next_stage + 1) % STAGES;
  };

#pragma unroll
  for (int i = 1; i < STAGES; ++i) fetch_next();
  int stage = 0;
  // All threads of a warp go through both loops together: lanes add up.
  for (int64_t first_item = static_cast<int64_t>(blockIdx.x) * blockDim.y; first_item < items;
       first_item += item_step) {
    const int64_t item = first_item + threadIdx.y;
    const bool here = has && item < items;
    for (int first_head = threadIdx.z; first_head < route.heads; first_head += step * EACH) {
      fetch_next();
      await_stage();
      const int4* from = stages + stage * VECTORS * threads + thread;
      Turn<N> turn{};
      if (here) turn = fetched_turn<N>(from + 2 * EACH * threads, threads, angles.sign);
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        const int head = first_head + e * step;
        if (head >= route.heads) continue;  // the same for all lanes
        Vec<T, N> low{}, high{};
        if (here) memcpy(&low, from + 2 * e * threads, 16), memcpy(&high, from + (2 * e + 1) * threads, 16);
        auto one = widen(low), two = widen(high);
        const float total = row_sum(squares(one) + squares(two), blockDim.x, nullptr);
        if (!here) continue;
        const float rstd = rsqrtf(total / static_cast<float>(width) + eps);
        if (threadIdx.x == 0) rstds[item * route.heads + head] = rstd;
        const float* factor = factors + (head == route.queries ? width : 0) + column;
        one = normalised<T>(one, rstd, load<N>(factor), round_first);
        two = normalised<T>(two, rstd, load<N>(factor + half), round_first);
        turn_pairs(turn, one, two);
        T* to = route.to(item, head) + column;
        store_once(to, narrow<T>(one)), store_once(to + half, narrow<T>(two));
      }
      stage = (stage + 1) % STAGES;
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
  with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    const bool vectors = in_steps(packed, args.half, N) &&
                         aligned({args.qkv, args.cos, args.sin, args.q_weight, args.k_weight, args.q, args.k});
    const Parted<T> route = parted<T>(turned);
    const Angles angles{args.cos, args.sin, args.half, 1.0f};
    const dim3 block = turn_block(args.half, packed.width, route.heads, vectors ? N : 1, EACH_NORMED);
    const unsigned blocks = grid(items, block.y);
    const Weights weights{args.q_weight, args.k_weight, args.weight_type, args.offset};
    const auto run = [&](auto kernel, unsigned blocks, size_t shared) {
      kernel<<<blocks, block, shared, stream>>>(route, angles, weights, items, args.eps, args.round_first, args.rstd);
    };
    if (vectors && 2 * args.half == packed.width && args.half <= block.x * N) {
      constexpr size_t bytes = STAGES * 16 * (2 * EACH_NORMED + ANGLE_VECTORS<N>);
      constexpr size_t factors = 2 * sizeof(float) * 2 * 32 * N;  // of the widest heads
      cudaFuncSetAttribute(norm_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, THREADS * bytes + factors);
      const size_t shared = block.x * block.y * block.z * bytes + 2 * sizeof(float) * packed.width;
      run(norm_kernel<T>, std::min<unsigned>(blocks, BLOCKS_NORM * multiprocessors()), shared);
    } else if (vectors) {
      run(any_norm_kernel<T, N>, blocks, 0);
    } else {
      run(any_norm_kernel<T, 1>, blocks, 0);
    }
  });
  return launched();
}

}  // namespace megatune::cuda
