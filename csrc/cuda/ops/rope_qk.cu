// Queries and keys of a packed q, k, v product: norm of each head if asked for, rotation and separation in one pass;
// backward writes the gradient of the whole product, the values' part included, in one pass too.

#include "../common/reduce.cuh"
#include "megatune/cuda_tokens.h"
#include "rope.cuh"

namespace megatune::cuda {

namespace {

constexpr int THREADS = TURN_WARPS * 32;
constexpr int EACH = 2, EACH_NORMED = 3, EACH_BACK = 2;  // heads that a thread has on their way
constexpr int BLOCKS_BACK = 2;  // of a multiprocessor, with the registers that their sums need
constexpr int KEPT = 8;         // columns of each kind that a lane has, of heads with a norm

// The heads of a group: queries, then the key, then the value.
template <class T>
struct Parted {
  const T* x;
  int64_t token_stride, group_stride, head_stride;
  T *q, *k;
  int64_t width;
  uint32_t groups;
  int queries, heads;

  __device__ const T* from(int64_t token, int64_t group, int64_t head) const {
    return x + token * token_stride + group * group_stride + head * head_stride;
  }
  __device__ T* to(int64_t item, int64_t head) const {
    return head < queries ? q + (item * queries + head) * width : k + item * width;
  }
  __device__ bool copies(int) const { return false; }
};

template <class T>
struct Joined {
  Heads q, k, v;
  T* y;
  int64_t width;
  uint32_t groups;
  int queries, heads;

  __device__ const T* from(int64_t token, int64_t group, int64_t head) const {
    const Heads& part = head < queries ? q : head == queries ? k : v;
    if (head < queries) group = group * queries + head;
    return static_cast<const T*>(part.data) + token * part.token_stride + group * part.head_stride;
  }
  __device__ T* to(int64_t item, int64_t head) const { return y + (item * heads + head) * width; }
  __device__ bool copies(int head) const { return head > queries; }
};

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

// Forward with a norm; threads as in turn_kernel. A lane keeps its first pair of columns. FAR: it may have more, which
// are read a second time, from the cache.
template <class T, int N, int EACH, bool FAR>
__global__ void __launch_bounds__(THREADS, 2) norm_kernel(const Parted<T> route, const Angles angles,
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
  for (int begin = threadIdx.z; begin < route.heads; begin += blockDim.z * EACH) {
    Vec<T, N> first[EACH]{}, second[EACH]{};
    float total[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int head = begin + i * blockDim.z;
      if (!kept || head >= route.heads) continue;
      const T* from = route.from(token, group, head) + own;
      first[i] = load_once<N>(from), second[i] = load_once<N>(from + half);
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      total[i] = squares(widen(first[i])) + squares(widen(second[i]));
      const int head = begin + i * blockDim.z;
      if (!FAR || !here || head >= route.heads) continue;
      const T* from = route.from(token, group, head);
      const auto add = [&](int64_t column) { total[i] += squares(widen(load<N>(from + column))); };
      far_columns<N>(half, width, [&](int64_t column) { add(column), add(half + column); }, add);
    }
    for (int lane = blockDim.x / 2; lane > 0; lane /= 2) {
#pragma unroll
      for (int i = 0; i < EACH; ++i) total[i] += __shfl_xor_sync(0xffffffffu, total[i], lane);
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int head = begin + i * blockDim.z;
      if (!here || head >= route.heads) continue;
      const bool key = head == route.queries;
      const float rstd = rsqrtf(total[i] / static_cast<float>(width) + eps);
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
      if (kept) write(turn, own, first[i], second[i]);
      if constexpr (FAR) {
        const T* from = route.from(token, group, head);
        far_columns<N>(
            half, width,
            [&](int64_t column) {
              write(turn_at<N>(angles, token, column), column, load<N>(from + column), load<N>(from + half + column));
            },
            [&](int64_t column) {
              store_once(to + column, narrow<T>(entered(load<N>(from + column), column)));
            });
      }
    }
  }
}

// Where part `i` of kind 0, 1, 2 (first half, second half, beyond both) of a lane's columns begins, or -1 where it has
// no such part.
template <int N>
__device__ inline int64_t column_of(int64_t half, int64_t width, int i, int kind) {
  const int64_t column = (static_cast<int64_t>(threadIdx.x) + static_cast<int64_t>(i) * blockDim.x) * N;
  if (kind == 2) return 2 * half + column < width ? 2 * half + column : -1;
  return column < half ? kind * half + column : -1;
}

template <int N, int PARTS, class Body>
__device__ inline void each_part(int64_t half, int64_t width, Body&& body) {
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
#pragma unroll
    for (int kind = 0; kind < 3; ++kind) {
      const int64_t column = column_of<N>(half, width, i, kind);
      if (column >= 0) body(i, kind, column);
    }
  }
}

struct Normed {
  const void* x;
  int64_t token_stride, group_stride, head_stride;
  const float* rstd;  // [items, queries + 1]
  float* partials;

  template <class T>
  __device__ const T* head(int64_t token, int64_t group, int64_t number) const {
    return static_cast<const T*>(x) + token * token_stride + group * group_stride + number * head_stride;
  }
};

// The sums of a block's threads for the gradients of both weights, as one row of `partials`. of_threads: [blockDim.z,
// blockDim.y, width], of which each thread has written its columns; the last of the threadIdx.z has those of keys.
__device__ inline void add_threads(const float* of_threads, int64_t width, float* partials) {
  const int query_rows = (blockDim.z - 1) * blockDim.y, rows = blockDim.z * blockDim.y;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  __syncthreads();
  for (int64_t column = thread; column < 2 * width; column += rows * blockDim.x) {
    const bool key = column >= width;
    float sum = 0.0f;
    for (int row = key ? query_rows : 0; row < (key ? rows : query_rows); ++row)
      sum += of_threads[row * width + (key ? column - width : column)];
    partials[blockIdx.x * 2 * width + column] = sum;
  }
}

// Backward with a norm. The last of the threadIdx.z has the keys and values of its items, the others have queries: sums
// for the gradient of one weight stay in registers until the end.
//
// With y = rstd * x * factor and g the gradient of y, turned back: that of the factor is the sum of g * rstd * x, that
// of x is g * rstd * factor - x * rstd^2 * mean(g * rstd * factor * x).
template <class T, int N>
__device__ inline float begin_part(Vec<float, N>& grad, const Vec<T, N>& x, float rstd, const Vec<float, N>& factor,
                                   Vec<float, N>& sum) {
  const auto wide = widen(x);
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    grad.at[i] *= rstd;
    sum.at[i] += grad.at[i] * wide.at[i];
    grad.at[i] *= factor.at[i];
    total += grad.at[i] * wide.at[i];
  }
  return total;
}

template <class T, int N>
__device__ inline Vec<T, N> end_part(Vec<float, N> scaled, const Vec<T, N>& x, float mean) {
  const auto wide = widen(x);
#pragma unroll
  for (int i = 0; i < N; ++i) scaled.at[i] -= wide.at[i] * mean;
  return narrow<T>(scaled);
}

// Heads of any kind. Of a head a lane has PARTS vectors of each of three kinds.
template <class T, int N, int PARTS>
__global__ void __launch_bounds__(THREADS) any_norm_backward_kernel(const Joined<T> route, const Angles angles,
                                                                    const Weights weights, const Normed normed,
                                                                    int64_t items) {
  extern __shared__ float of_threads[];
  const int64_t half = angles.half, width = route.width;
  const int query_rows = blockDim.z - 1, queries = route.queries;
  const bool is_query = threadIdx.z < query_rows;
  const int begin = is_query ? threadIdx.z : queries, end = is_query ? queries : queries + 2;
  const auto each = [&](auto&& body) { each_part<N, PARTS>(half, width, body); };
  Vec<float, N> sums[PARTS][3]{}, factors[PARTS][3]{};
  each([&](int i, int kind, int64_t column) { factors[i][kind] = weights.at<N>(!is_query, column); });

  // All threads of a warp go through both loops together: lanes add up.
  for (int64_t first_item = static_cast<int64_t>(blockIdx.x) * blockDim.y; first_item < items;
       first_item += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t item = first_item + threadIdx.y;
    const bool here = item < items;
    const uint32_t token = static_cast<uint32_t>(item) / route.groups;
    const uint32_t group = static_cast<uint32_t>(item) % route.groups;
    for (int head = begin; head < end; head += is_query ? query_rows : 1) {
      Vec<T, N> grad[PARTS][3]{}, x[PARTS][3]{};
      const T* from = route.from(token, group, head);
      T* to = route.to(item, head);
      if (here) each([&](int i, int kind, int64_t column) { grad[i][kind] = load_once<N>(from + column); });
      if (route.copies(head)) {  // the same for all lanes
        if (here) each([&](int i, int kind, int64_t column) { store_once(to + column, grad[i][kind]); });
        continue;
      }
      const T* before = normed.head<T>(token, group, head);
      if (here) each([&](int i, int kind, int64_t column) { x[i][kind] = load_once<N>(before + column); });
      const float rstd = here ? normed.rstd[item * (queries + 1) + head] : 0.0f;
      Vec<float, N> scaled[PARTS][3];
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < PARTS; ++i) {
        Turn<N> turn{};
        const int64_t column = column_of<N>(half, width, i, 0);
        if (here && column >= 0) turn = turn_at<N>(angles, token, column);
#pragma unroll
        for (int kind = 0; kind < 3; ++kind) scaled[i][kind] = widen(grad[i][kind]);
        turn_pairs(turn, scaled[i][0], scaled[i][1]);
#pragma unroll
        for (int kind = 0; kind < 3; ++kind)
          total += begin_part(scaled[i][kind], x[i][kind], rstd, factors[i][kind], sums[i][kind]);
      }
      const float mean = row_sum(total, blockDim.x, nullptr) / static_cast<float>(width) * rstd * rstd;
      if (!here) continue;
      each([&](int i, int kind, int64_t column) {
        store_once(to + column, end_part(scaled[i][kind], x[i][kind], mean));
      });
    }
  }
  if (normed.partials == nullptr) return;
  float* mine = of_threads + (threadIdx.z * blockDim.y + threadIdx.y) * width;
  each([&](int i, int kind, int64_t column) { store(mine + column, sums[i][kind]); });
  add_threads(of_threads, width, normed.partials);
}

// Heads that are turned whole and of which a lane has one pair of vectors. What a thread computes next is on its way to
// places of its own in shared memory meanwhile, in STAGES of EACH_BACK heads: more of it than registers could hold.
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

// Bytes of a stage of one thread: of each head gradient, x and rstd; the angles.
template <int N>
constexpr int stage_bytes() { return EACH_BACK * (4 * 16 + 4) + 2 * N * 4; }

template <class T>
__global__ void __launch_bounds__(THREADS, BLOCKS_BACK)
    norm_backward_kernel(const Joined<T> route, const Angles angles, const Weights weights, const Normed normed,
                         int64_t items) {
  constexpr int N = 16 / sizeof(T), EACH = EACH_BACK, ANGLES = N / 4, VECTORS = EACH * 4 + 2 * ANGLES;
  // [STAGES][VECTORS][threads], then [STAGES][EACH][threads] of rstd; at the end the sums.
  extern __shared__ int4 stages[];
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  float* rstds = reinterpret_cast<float*>(stages + STAGES * VECTORS * threads) + thread;
  const int64_t half = angles.half, column = static_cast<int64_t>(threadIdx.x) * N;
  const int query_rows = blockDim.z - 1, queries = route.queries;
  const bool is_query = threadIdx.z < query_rows, has = column < half;
  const int begin = is_query ? threadIdx.z : queries, end = is_query ? queries : queries + 2;
  const int step = is_query ? query_rows : 1;
  const int64_t item_step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  Vec<float, N> sums[2]{}, factors[2]{};
  if (has) factors[0] = weights.at<N>(!is_query, column), factors[1] = weights.at<N>(!is_query, half + column);

  int64_t next_item = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  int next_head = begin, next_stage = 0;
  const auto fetch_next = [&] {
    if (has && next_item < items) {
      const uint32_t token = static_cast<uint32_t>(next_item) / route.groups;
      const uint32_t group = static_cast<uint32_t>(next_item) % route.groups;
      int4* to = stages + next_stage * VECTORS * threads + thread;
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        const int head = next_head + e * step;
        if (head >= end) continue;
        const T* grad = route.from(token, group, head) + column;
        fetch(to + 4 * e * threads, grad), fetch(to + (4 * e + 1) * threads, grad + half);
        if (route.copies(head)) continue;
        const T* x = normed.head<T>(token, group, head) + column;
        fetch(to + (4 * e + 2) * threads, x), fetch(to + (4 * e + 3) * threads, x + half);
        fetch_shared<4>(rstds + (next_stage * EACH + e) * threads, normed.rstd + next_item * (queries + 1) + head);
      }
#pragma unroll
      for (int i = 0; i < ANGLES; ++i) {
        const int64_t at = token * half + column + 4 * i;
        fetch_shared<16>(to + (4 * EACH + i) * threads, angles.cos + at);
        fetch_shared<16>(to + (4 * EACH + ANGLES + i) * threads, angles.sin + at);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    next_head += step * EACH;
    if (next_head >= end) next_head = begin, next_item += item_step;
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
    for (int first_head = begin; first_head < end; first_head += step * EACH) {
      fetch_next();
      asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
      const int4* from = stages + stage * VECTORS * threads + thread;
      Turn<N> turn{};
      if (here) {
#pragma unroll
        for (int i = 0; i < ANGLES; ++i) {
          memcpy(turn.cos.at + 4 * i, from + (4 * EACH + i) * threads, 16);
          memcpy(turn.sin.at + 4 * i, from + (4 * EACH + ANGLES + i) * threads, 16);
        }
#pragma unroll
        for (int i = 0; i < N; ++i) turn.sin.at[i] *= angles.sign;
      }
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        const int head = first_head + e * step;
        const bool writes = here && head < end;
        Vec<T, N> grad[2]{}, x[2]{};
        float rstd = 0.0f;
        if (writes) memcpy(&grad[0], from + 4 * e * threads, 16), memcpy(&grad[1], from + (4 * e + 1) * threads, 16);
        if (!route.copies(head)) {  // the same for all lanes
          if (writes) {
            memcpy(&x[0], from + (4 * e + 2) * threads, 16), memcpy(&x[1], from + (4 * e + 3) * threads, 16);
            rstd = rstds[(stage * EACH + e) * threads];
          }
          Vec<float, N> scaled[2] = {widen(grad[0]), widen(grad[1])};
          turn_pairs(turn, scaled[0], scaled[1]);
          const float total = begin_part(scaled[0], x[0], rstd, factors[0], sums[0]) +
                              begin_part(scaled[1], x[1], rstd, factors[1], sums[1]);
          const float mean = row_sum(total, blockDim.x, nullptr) / static_cast<float>(route.width) * rstd * rstd;
          grad[0] = end_part(scaled[0], x[0], mean), grad[1] = end_part(scaled[1], x[1], mean);
        }
        if (!writes) continue;
        T* to = route.to(item, head) + column;
        store_once(to, grad[0]), store_once(to + half, grad[1]);
      }
      stage = (stage + 1) % STAGES;
    }
  }
  if (normed.partials == nullptr) return;
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  float* of_threads = reinterpret_cast<float*>(stages);
  float* mine = of_threads + (threadIdx.z * blockDim.y + threadIdx.y) * route.width + column;
  if (has) store(mine, sums[0]), store(mine + half, sums[1]);
  add_threads(of_threads, route.width, normed.partials);
}

constexpr int COLUMNS = 16, SLICES = 32;

// Sum over the rows of `partials`, for 16 columns in a block; 32 threads share a column.
__global__ void __launch_bounds__(COLUMNS * SLICES) columns_kernel(const float* partials, int64_t count, int64_t width,
                                                                   float* sums) {
  __shared__ float shared[SLICES][COLUMNS + 1];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * COLUMNS + threadIdx.x;
  float sum = 0.0f;
  if (column < width) {
#pragma unroll 8
    for (int64_t row = threadIdx.y; row < count; row += SLICES) sum += partials[row * width + column];
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= width) return;
  for (int slice = 1; slice < SLICES; ++slice) sum += shared[slice][threadIdx.x];
  sums[column] = sum;
}

bool in_steps(const Packed& packed, int64_t half, int64_t step) {
  return half % step == 0 && packed.width % step == 0 && packed.token_stride % step == 0 &&
         packed.group_stride % step == 0 && packed.head_stride % step == 0;
}

bool too_many(const Packed& packed) {
  return packed.tokens * packed.groups > UINT32_MAX || packed.queries > INT32_MAX - 2;
}

struct Shape {
  bool vectors;
  dim3 block;
};

Shape backward_shape(const RopeQkBackward& args) {
  const Packed& packed = args.packed;
  const int step = args.type == Type::f32 ? 4 : 8;
  bool vectors = in_steps(packed, args.half, step) &&
                 aligned({args.qkv, args.cos, args.sin, args.q_weight, args.k_weight, args.grad_qkv});
  for (const Heads* heads : {&args.grad_q, &args.grad_k, &args.grad_v})
    vectors = vectors && aligned({heads->data}) && heads->token_stride % step == 0 && heads->head_stride % step == 0;
  const int elements = vectors ? step : 1;
  if (args.q_weight == nullptr)
    return {vectors, turn_block(args.half, packed.width, packed.queries + 2, elements, EACH)};
  dim3 block = turn_block(args.half, packed.width, packed.queries, elements, EACH_BACK);
  // One more row, for keys and values.
  const unsigned rows = std::min<unsigned>(block.z + 1, TURN_WARPS);
  return {vectors, dim3(block.x, 32 / block.x * (TURN_WARPS / rows), rows)};
}

}  // namespace

int rope_qk(const RopeQk& args, Stream stream) {
  const Packed& packed = args.packed;
  const int64_t items = packed.tokens * packed.groups;
  if (items == 0 || packed.width == 0) return 0;
  if (too_many(packed)) return static_cast<int>(cudaErrorInvalidValue);
  with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    const bool vectors = in_steps(packed, args.half, N) &&
                         aligned({args.qkv, args.cos, args.sin, args.q_weight, args.k_weight, args.q, args.k});
    const int queries = static_cast<int>(packed.queries);
    const Parted<T> route{static_cast<const T*>(args.qkv),
                          packed.token_stride,
                          packed.group_stride,
                          packed.head_stride,
                          static_cast<T*>(args.q),
                          static_cast<T*>(args.k),
                          packed.width,
                          static_cast<uint32_t>(packed.groups),
                          queries,
                          queries + 1};
    const Angles angles{args.cos, args.sin, args.half, 1.0f};
    const bool norm = args.q_weight != nullptr;
    const dim3 block =
        turn_block(args.half, packed.width, route.heads, vectors ? N : 1, norm ? EACH_NORMED : EACH);
    const unsigned blocks = grid(items, block.y);
    const auto run = [&](auto kernel, const auto&... more) {
      kernel<<<blocks, block, 0, stream>>>(route, angles, more...);
    };
    if (norm) {
      const Weights weights{args.q_weight, args.k_weight, args.weight_type, args.offset};
      const auto run_norm = [&](auto kernel) { run(kernel, weights, items, args.eps, args.round_first, args.rstd); };
      const bool whole = 2 * args.half == packed.width && args.half <= block.x * N;
      if (vectors && whole) {
        run_norm(norm_kernel<T, N, EACH_NORMED, false>);
      } else if (vectors) {
        run_norm(norm_kernel<T, N, 1, true>);
      } else {
        run_norm(norm_kernel<T, 1, 1, true>);
      }
    } else if (vectors) {
      run(turn_kernel<T, N, EACH, Parted<T>>, items, packed.width);
    } else {
      run(turn_kernel<T, 1, EACH, Parted<T>>, items, packed.width);
    }
  });
  return launched();
}

int64_t rope_qk_partials(const RopeQkBackward& args) {
  const Shape shape = backward_shape(args);
  return std::min<int64_t>(grid(args.packed.tokens * args.packed.groups, shape.block.y),
                           BLOCKS_BACK * multiprocessors());
}

int rope_qk_backward(const RopeQkBackward& args, Stream stream) {
  const Packed& packed = args.packed;
  const int64_t items = packed.tokens * packed.groups;
  const bool any = items != 0 && packed.width != 0;
  const int64_t most = rope_qk_partials(args);
  if (any) {
    const Shape shape = backward_shape(args);
    const bool norm = args.q_weight != nullptr;
    if (too_many(packed) || (norm && std::max(args.half, packed.width - 2 * args.half) > ROPE_QK_NORM))
      return static_cast<int>(cudaErrorInvalidValue);
    with_type(args.type, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      constexpr int N = 16 / sizeof(T);
      const int queries = static_cast<int>(packed.queries);
      const Joined<T> route{args.grad_q, args.grad_k, args.grad_v, static_cast<T*>(args.grad_qkv), packed.width,
                            static_cast<uint32_t>(packed.groups), queries, queries + 2};
      const Angles angles{args.cos, args.sin, args.half, -1.0f};
      if (norm) {
        const Weights weights{args.q_weight, args.k_weight, args.weight_type, args.offset};
        const Normed normed{args.qkv,  packed.token_stride, packed.group_stride, packed.head_stride,
                            args.rstd, args.partials};
        const size_t rows = shape.block.y * shape.block.z, threads = rows * shape.block.x;
        const auto run = [&](auto kernel, size_t shared) {
          kernel<<<static_cast<unsigned>(most), shape.block, shared, stream>>>(route, angles, weights, normed, items);
        };
        const size_t sums = args.partials == nullptr ? 0 : rows * packed.width * sizeof(float);
        if (shape.vectors && 2 * args.half == packed.width && args.half <= shape.block.x * N) {
          constexpr int bytes = STAGES * stage_bytes<N>();
          cudaFuncSetAttribute(norm_backward_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes * THREADS);
          run(norm_backward_kernel<T>, bytes * threads);  // the sums, 2 * N floats of a thread, are less
        } else if (shape.vectors) {
          run(any_norm_backward_kernel<T, N, KEPT / N>, sums);
        } else {
          run(any_norm_backward_kernel<T, 1, KEPT>, sums);
        }
      } else {
        const unsigned blocks = grid(items, shape.block.y);
        if (shape.vectors) {
          turn_kernel<T, N, EACH><<<blocks, shape.block, 0, stream>>>(route, angles, items, packed.width);
        } else {
          turn_kernel<T, 1, EACH><<<blocks, shape.block, 0, stream>>>(route, angles, items, packed.width);
        }
      }
    });
    if (const int error = launched()) return error;
  }
  if (args.partials == nullptr || packed.width == 0) return 0;
  const int64_t columns = 2 * packed.width;
  columns_kernel<<<grid(columns, COLUMNS), dim3(COLUMNS, SLICES), 0, stream>>>(args.partials, any ? most : 0, columns,
                                                                              args.grad_weight);
  return launched();
}

}  // namespace megatune::cuda
