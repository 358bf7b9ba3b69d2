// Backward of rope_qk.cu: the gradient of the whole product, the values' part included, in one pass.

#include "../common/running.cuh"
#include "rope_qk.cuh"

namespace megatune::cuda {

namespace {

constexpr int EACH = 2;         // heads that a thread has on their way, without a norm
constexpr int IN_TURN = 2;      // queries that a thread has one after the other, if it can be, with one
constexpr int BLOCKS_BACK = 2;  // of a multiprocessor, with the registers that their sums need
constexpr int KEPT = 8;         // columns of each kind that a lane has, of heads with a norm
constexpr int STAGES = 3;       // heads of a thread: one that is computed, the others being fetched

// The heads of a group: queries, then the key, then the value.
template <class T>
struct Joined {
  Heads q, k, v;
  T* y;
  int64_t width;
  uint32_t groups;
  int queries, heads;

  __device__ const T* query(int64_t token, int64_t group, int64_t head) const {
    return static_cast<const T*>(q.data) + token * q.token_stride + (group * queries + head) * q.head_stride;
  }
  __device__ const T* other(int64_t token, int64_t group, int64_t head) const {
    const Heads& part = head == queries ? k : v;
    return static_cast<const T*>(part.data) + token * part.token_stride + group * part.head_stride;
  }
  __device__ const T* from(int64_t token, int64_t group, int64_t head) const {
    return head < queries ? query(token, group, head) : other(token, group, head);
  }
  __device__ T* to(int64_t item, int64_t head) const { return y + (item * heads + head) * width; }
  __device__ bool copies(int head) const { return head > queries; }
};

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
template <class T>
__device__ inline void add_threads(const float* of_threads, int64_t width, float* partials) {
  const int query_rows = (blockDim.z - 1) * blockDim.y, rows = blockDim.z * blockDim.y;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  __syncthreads();
  for (int64_t column = thread; column < 2 * width; column += rows * blockDim.x) {
    const bool key = column >= width;
    Running<T, 1> total;
    for (int row = key ? query_rows : 0; row < (key ? rows : query_rows); ++row)
      total.add(0, of_threads[row * width + (key ? column - width : column)]);
    partials[blockIdx.x * 2 * width + column] = total.sums.at[0];
  }
}

// Backward with a norm. The last of the threadIdx.z has the keys and values of its items, the others have queries: sums
// for the gradient of one weight stay in registers until the end.
//
// With y = rstd * x * factor and g the gradient of y, turned back: that of the factor is the sum of g * rstd * x, that
// of x is g * rstd * factor - x * rstd^2 * mean(g * rstd * factor * x).
template <class T, int N>
__device__ inline float begin_part(Vec<float, N>& grad, const Vec<T, N>& x, float rstd, const Vec<float, N>& factor,
                                   Running<T, N>& sum) {
  const auto wide = widen(x);
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    grad.at[i] *= rstd;
    sum.add(i, grad.at[i] * wide.at[i]);
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
  Running<T, N> sums[PARTS][3];
  Vec<float, N> factors[PARTS][3]{};
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
      const float mean = head_sum(total, blockDim.x) / static_cast<float>(width) * rstd * rstd;
      if (!here) continue;
      each([&](int i, int kind, int64_t column) {
        store_once(to + column, end_part(scaled[i][kind], x[i][kind], mean));
      });
    }
  }
  if (normed.partials == nullptr) return;
  float* mine = of_threads + (threadIdx.z * blockDim.y + threadIdx.y) * width;
  each([&](int i, int kind, int64_t column) { store(mine + column, sums[i][kind].sums); });
  add_threads<T>(of_threads, width, normed.partials);
}

// Fetching ahead, for heads that are turned whole, of which a lane has one pair of vectors: what a thread computes next
// is on its way to places of its own in shared memory meanwhile, more of it than registers could hold.
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

// A vector that was fetched. (With memcpy the compiler may take it byte by byte.)
template <class T>
__device__ inline auto fetched(const int4* from) { return load<16 / sizeof(T)>(reinterpret_cast<const T*>(from)); }

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
    const auto cos = fetched<float>(from + i * threads), sin = fetched<float>(from + (N / 4 + i) * threads);
#pragma unroll
    for (int j = 0; j < 4; ++j) turn.cos.at[4 * i + j] = cos.at[j], turn.sin.at[4 * i + j] = sin.at[j] * sign;
  }
  return turn;
}

// Vectors of a stage of one thread: of a head gradient and x, two each, and the angles.
template <int N>
constexpr int STAGE_VECTORS = 4 + ANGLE_VECTORS<N>;

template <class T>
__global__ void __launch_bounds__(THREADS, BLOCKS_BACK)
    norm_backward_kernel(const Joined<T> route, const Angles angles, const Weights weights, const Normed normed,
                         int64_t items) {
  constexpr int N = 16 / sizeof(T), VECTORS = STAGE_VECTORS<N>;
  let_next_begin();
  // [STAGES][VECTORS][threads], then [STAGES][threads] of rstd; at the end the sums.
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
  const float share = 1.0f / static_cast<float>(route.width);
  Running<T, N> sums[2];
  Vec<float, N> factors[2]{};
  if (has) factors[0] = weights.at<N>(!is_query, column), factors[1] = weights.at<N>(!is_query, half + column);

  int64_t next_item = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  int next_head = begin, next_stage = 0;
  const auto fetch_next = [&] {
    if (has && next_item < items) {
      const uint32_t token = static_cast<uint32_t>(next_item) / route.groups;
      const uint32_t group = static_cast<uint32_t>(next_item) % route.groups;
      int4* to = stages + next_stage * VECTORS * threads + thread;
      const T* grad = (is_query ? route.query(token, group, next_head) : route.other(token, group, next_head)) + column;
      fetch(to, grad), fetch(to + threads, grad + half);
      if (!route.copies(next_head)) {
        const T* x = normed.head<T>(token, group, next_head) + column;
        fetch(to + 2 * threads, x), fetch(to + 3 * threads, x + half);
        fetch_shared<4>(rstds + next_stage * threads, normed.rstd + next_item * (queries + 1) + next_head);
        fetch_angles<N>(to + 4 * threads, threads, angles, token, column);
      }
    }
    end_stage();
    next_head += step;
    if (next_head >= end) next_head = begin, next_item += item_step;
    next_stage = next_stage + 1 == STAGES ? 0 : next_stage + 1;
  };

#pragma unroll
  for (int i = 1; i < STAGES; ++i) fetch_next();
  int stage = 0;
  // All threads of a warp go through both loops together: lanes add up.
  for (int64_t first_item = static_cast<int64_t>(blockIdx.x) * blockDim.y; first_item < items;
       first_item += item_step) {
    const int64_t item = first_item + threadIdx.y;
    const bool here = has && item < items;
    for (int head = begin; head < end; head += step) {
      fetch_next();
      await_stage();
      const int4* from = stages + stage * VECTORS * threads + thread;
      Vec<T, N> grad[2]{};
      if (here) grad[0] = fetched<T>(from), grad[1] = fetched<T>(from + threads);
      if (!route.copies(head)) {  // the same for all lanes
        Vec<T, N> x[2]{};
        Turn<N> turn{};
        float rstd = 0.0f;
        if (here) {
          x[0] = fetched<T>(from + 2 * threads), x[1] = fetched<T>(from + 3 * threads);
          turn = fetched_turn<N>(from + 4 * threads, threads, angles.sign);
          rstd = rstds[stage * threads];
        }
        Vec<float, N> scaled[2] = {widen(grad[0]), widen(grad[1])};
        turn_pairs(turn, scaled[0], scaled[1]);
        const float total = begin_part(scaled[0], x[0], rstd, factors[0], sums[0]) +
                            begin_part(scaled[1], x[1], rstd, factors[1], sums[1]);
        const float mean = head_sum(total, blockDim.x) * share * rstd * rstd;
        grad[0] = end_part(scaled[0], x[0], mean), grad[1] = end_part(scaled[1], x[1], mean);
      }
      if (here) {
        T* to = route.to(item, head) + column;
        store_once(to, grad[0]), store_once(to + half, grad[1]);
      }
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
  }
  if (normed.partials == nullptr) return;
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  float* of_threads = reinterpret_cast<float*>(stages);
  float* mine = of_threads + (threadIdx.z * blockDim.y + threadIdx.y) * route.width + column;
  if (has) store(mine, sums[0].sums), store(mine + half, sums[1].sums);
  add_threads<T>(of_threads, route.width, normed.partials);
}

constexpr int COLUMNS = 16, SLICES = 32;

// Sum over the rows of `partials`, of heads of T, for 16 columns in a block; 32 threads share a column.
template <class T>
__global__ void __launch_bounds__(COLUMNS * SLICES) columns_kernel(const float* partials, int64_t count, int64_t width,
                                                                   float* sums) {
  __shared__ float shared[SLICES][COLUMNS + 1];
  wait_for_previous();
  const int64_t column = static_cast<int64_t>(blockIdx.x) * COLUMNS + threadIdx.x;
  Running<T, 1> total;
  if (column < width) {
#pragma unroll 8
    for (int64_t row = threadIdx.y; row < count; row += SLICES) total.add(0, partials[row * width + column]);
  }
  shared[threadIdx.y][threadIdx.x] = total.sums.at[0];
  __syncthreads();
  if (threadIdx.y != 0 || column >= width) return;
  for (int slice = 1; slice < SLICES; ++slice) total.add(0, shared[slice][threadIdx.x]);
  sums[column] = total.sums.at[0];
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
  dim3 block = turn_block(args.half, packed.width, packed.queries, elements, IN_TURN);
  // One more row, for keys and values.
  const unsigned rows = std::min<unsigned>(block.z + 1, TURN_WARPS);
  return {vectors, dim3(block.x, 32 / block.x * (TURN_WARPS / rows), rows)};
}

}  // namespace

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
          constexpr int bytes = STAGES * (STAGE_VECTORS<N> * sizeof(int4) + sizeof(float));
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
  const auto add_up = args.type == Type::f32 ? columns_kernel<float> : columns_kernel<__nv_bfloat16>;
  return launch_early(add_up, grid(columns, COLUMNS), dim3(COLUMNS, SLICES), 0, stream, args.partials, any ? most : 0,
                      columns, args.grad_weight);
}

}  // namespace megatune::cuda
