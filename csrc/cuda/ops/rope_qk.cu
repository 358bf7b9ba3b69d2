// Queries and keys of a packed q, k, v product: norm of each head if asked for, rotation and separation in one pass;
// backward writes the gradient of the whole product, the values' part included, in one pass too.
//
// A head is shared by some lanes of a warp. A lane has the pairs of columns (c, half + c) for c in steps of lanes * N:
// rotation is within it, so that only the norm's sums cross lanes. What it does not keep in registers it reads again,
// from the cache.

#include "../common/launch.cuh"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "megatune/cuda_tokens.h"

namespace megatune::cuda {

namespace {

constexpr int THREADS = 256;
constexpr int HEADS = 4;     // without a norm: that a thread has on their way
constexpr int COLUMNS = 32;  // lanes of a head at most
constexpr int KEPT = 8;      // columns of each kind that a lane has, of heads with a norm

// Where head `number` of a token is: heads [0, queries) of a group are queries, then come the key and the value.
struct Place {
  int64_t group;
  int64_t in_group;
};

__device__ inline Place place_of(int64_t number, int64_t each) {
  const uint32_t n = static_cast<uint32_t>(number), e = static_cast<uint32_t>(each);
  return {n / e, n % e};
}

// Calls body(column) for the first column of each vector of this lane: pairs (column, half + column), then single ones
// beyond both halves with body(column) of `single`.
template <int N, class Pairs, class Single>
__device__ inline void each_column(int64_t half, int64_t width, Pairs&& pairs, Single&& single) {
  for (int64_t column = static_cast<int64_t>(threadIdx.x) * N; column < half; column += blockDim.x * N) pairs(column);
  for (int64_t column = 2 * half + static_cast<int64_t>(threadIdx.x) * N; column < width; column += blockDim.x * N)
    single(column);
}

// N elements of the head, normalised if there is a weight.
template <class T, int N>
__device__ Vec<float, N> entered(const RopeQk& args, const T* x, int64_t column, const void* weight, float rstd) {
  Vec<float, N> values = widen(load<N>(x + column));
  if (weight == nullptr) return values;
  const auto factor = load_any<N>(weight, args.weight_type, column);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float value = values.at[i] * rstd;
    if (args.round_first) value = to_float(from_float<T>(value));
    values.at[i] = value * (args.offset + factor.at[i]);
  }
  return values;
}

template <class T>
__device__ const T* head_of(const Heads& heads, int64_t token, int64_t head) {
  return static_cast<const T*>(heads.data) + token * heads.token_stride + head * heads.head_stride;
}

// Heads without a norm, and where they come from and go to. Forward: the queries and the key of each group.
template <class T>
struct Apart {
  RopeQk args;
  static constexpr float sign = 1.0f;
  __host__ __device__ int64_t each() const { return args.packed.queries + 1; }
  __device__ bool turns(const Place&) const { return true; }
  __device__ const T* from(int64_t token, const Place& place) const {
    return static_cast<const T*>(args.qkv) + token * args.packed.token_stride + place.group * args.packed.group_stride +
           place.in_group * args.packed.head_stride;
  }
  __device__ T* to(int64_t token, const Place& place) const {
    const int64_t key = token * args.packed.groups + place.group;
    if (place.in_group == args.packed.queries) return static_cast<T*>(args.k) + key * args.packed.width;
    return static_cast<T*>(args.q) + (key * args.packed.queries + place.in_group) * args.packed.width;
  }
};

// Backward: the value too, which is not turned.
template <class T>
struct Together {
  RopeQkBackward args;
  static constexpr float sign = -1.0f;
  __host__ __device__ int64_t each() const { return args.packed.queries + 2; }
  __device__ bool turns(const Place& place) const { return place.in_group <= args.packed.queries; }
  __device__ const T* from(int64_t token, const Place& place) const {
    if (!turns(place)) return head_of<T>(args.grad_v, token, place.group);
    if (place.in_group == args.packed.queries) return head_of<T>(args.grad_k, token, place.group);
    return head_of<T>(args.grad_q, token, place.group * args.packed.queries + place.in_group);
  }
  __device__ T* to(int64_t token, const Place& place) const {
    return static_cast<T*>(args.grad_qkv) +
           ((token * args.packed.groups + place.group) * each() + place.in_group) * args.packed.width;
  }
};

// threadIdx.x: columns, .y: heads, .z: tokens. A thread reads HEADS heads before it writes any: the compiler moves no
// load before a store. It loads its angles once for all heads.
template <class T, int N, class Task>
__global__ void __launch_bounds__(THREADS) turn_kernel(const Task task) {
  const Packed& packed = task.args.packed;
  const int64_t half = task.args.half, width = packed.width, each = task.each();
  const int heads = static_cast<int>(packed.groups * each);
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z; token < packed.tokens;
       token += static_cast<int64_t>(gridDim.x) * blockDim.z) {
    for (int64_t column = static_cast<int64_t>(threadIdx.x) * N; column < half; column += blockDim.x * N) {
      const auto cos = load_any<N>(task.args.cos, Type::f32, token * half + column);
      const auto sin = load_any<N>(task.args.sin, Type::f32, token * half + column);
      for (int begin = threadIdx.y; begin < heads; begin += blockDim.y * HEADS) {
        Vec<T, N> first[HEADS], second[HEADS];
#pragma unroll
        for (int i = 0; i < HEADS; ++i) {
          const int number = begin + i * blockDim.y;
          if (number >= heads) continue;
          const T* from = task.from(token, place_of(number, each)) + column;
          first[i] = load<N>(from), second[i] = load<N>(from + half);
        }
#pragma unroll
        for (int i = 0; i < HEADS; ++i) {
          const int number = begin + i * blockDim.y;
          if (number >= heads) continue;
          const Place place = place_of(number, each);
          T* to = task.to(token, place) + column;
          if (task.turns(place)) {
            const auto one = widen(first[i]), two = widen(second[i]);
            Vec<float, N> low, high;
#pragma unroll
            for (int j = 0; j < N; ++j) {
              low.at[j] = one.at[j] * cos.at[j] - two.at[j] * (Task::sign * sin.at[j]);
              high.at[j] = two.at[j] * cos.at[j] + one.at[j] * (Task::sign * sin.at[j]);
            }
            first[i] = narrow<T>(low), second[i] = narrow<T>(high);
          }
          store_whole(to, first[i]);
          store_whole(to + half, second[i]);
        }
      }
    }
    // What is beyond the rotated dimensions passes through.
    for (int64_t column = 2 * half + static_cast<int64_t>(threadIdx.x) * N; column < width; column += blockDim.x * N) {
      for (int number = threadIdx.y; number < heads; number += blockDim.y) {
        const Place place = place_of(number, each);
        store_whole(task.to(token, place) + column, load<N>(task.from(token, place) + column));
      }
    }
  }
}

// threadIdx.x: columns, .y: heads, .z: tokens.
template <class T, int N>
__global__ void __launch_bounds__(THREADS) forward_kernel(const RopeQk args) {
  const Packed& packed = args.packed;
  const int64_t each = packed.queries + 1, heads = packed.groups * each;
  const int lanes = blockDim.x;
  // All threads of a block go through both loops equally often: lanes of a warp add up together.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.z; first < packed.tokens;
       first += static_cast<int64_t>(gridDim.x) * blockDim.z) {
    const int64_t token = first + threadIdx.z;
    for (int64_t begin = 0; begin < heads; begin += blockDim.y) {
      const int64_t number = begin + threadIdx.y;
      const bool here = token < packed.tokens && number < heads;
      const Place place = place_of(here ? number : 0, each);
      const bool is_key = place.in_group == packed.queries;
      const T* x = static_cast<const T*>(args.qkv) + (here ? token : 0) * packed.token_stride +
                   place.group * packed.group_stride + place.in_group * packed.head_stride;
      const void* weight = is_key ? args.k_weight : args.q_weight;
      float rstd = 1.0f;
      if (args.q_weight != nullptr) {  // the same for all threads
        float total = 0.0f;
        const auto add = [&](int64_t column) {
          const auto values = widen(load<N>(x + column));
#pragma unroll
          for (int i = 0; i < N; ++i) total += values.at[i] * values.at[i];
        };
        if (here) each_column<N>(args.half, packed.width, [&](int64_t c) { add(c), add(args.half + c); }, add);
        total = row_sum(total, lanes, nullptr);
        rstd = rsqrtf(total / static_cast<float>(packed.width) + args.eps);
      }
      if (!here) continue;
      const int64_t query = (token * packed.groups + place.group) * packed.queries + place.in_group;
      const int64_t key = token * packed.groups + place.group;
      T* y = is_key ? static_cast<T*>(args.k) + key * packed.width : static_cast<T*>(args.q) + query * packed.width;
      if (args.q_weight != nullptr && threadIdx.x == 0) (is_key ? args.k_rstd[key] : args.q_rstd[query]) = rstd;
      each_column<N>(
          args.half, packed.width,
          [&](int64_t column) {
            const auto cos = load_any<N>(args.cos, Type::f32, token * args.half + column);
            const auto sin = load_any<N>(args.sin, Type::f32, token * args.half + column);
            const auto one = entered<T, N>(args, x, column, weight, rstd);
            const auto two = entered<T, N>(args, x, args.half + column, weight, rstd);
            Vec<float, N> low, high;
#pragma unroll
            for (int i = 0; i < N; ++i) {
              low.at[i] = one.at[i] * cos.at[i] - two.at[i] * sin.at[i];
              high.at[i] = two.at[i] * cos.at[i] + one.at[i] * sin.at[i];
            }
            store_whole(y + column, narrow<T>(low));
            store_whole(y + args.half + column, narrow<T>(high));
          },
          [&](int64_t column) { store_whole(y + column, narrow<T>(entered<T, N>(args, x, column, weight, rstd))); });
    }
  }
}

// The gradient before the rotation: turned back by the angles of the token.
template <class T, int N>
__device__ void turn_back(const RopeQkBackward& args, const T* grad, int64_t token, int64_t column, Vec<float, N>& one,
                          Vec<float, N>& two) {
  const auto cos = load_any<N>(args.cos, Type::f32, token * args.half + column);
  const auto sin = load_any<N>(args.sin, Type::f32, token * args.half + column);
  const auto low = widen(load<N>(grad + column)), high = widen(load<N>(grad + args.half + column));
#pragma unroll
  for (int i = 0; i < N; ++i) {
    one.at[i] = low.at[i] * cos.at[i] + high.at[i] * sin.at[i];
    two.at[i] = high.at[i] * cos.at[i] - low.at[i] * sin.at[i];
  }
}

// With a norm. Each lane keeps its columns of one head in registers, as PARTS vectors of KINDS kinds: of the first half, of
// the second half, and beyond both where the head is not turned whole. Sums for the gradients of the weights stay in registers until the end.
// Where part `i` of kind 0, 1, 2 begins, or -1 where this lane has no such part.
template <int N>
__device__ inline int64_t column_of(int64_t half, int64_t width, int i, int kind) {
  const int64_t column = (static_cast<int64_t>(threadIdx.x) + static_cast<int64_t>(i) * blockDim.x) * N;
  if (kind == 2) return 2 * half + column < width ? 2 * half + column : -1;
  return column < half ? kind * half + column : -1;
}

template <class T, int N, int KINDS, int PARTS = KEPT / N>
__global__ void __launch_bounds__(THREADS, KINDS == 2 ? 2 : 1) norm_backward_kernel(const RopeQkBackward args) {
  extern __shared__ float of_rows[];  // [blockDim.y * blockDim.z, 2, width]
  const Packed& packed = args.packed;
  const int64_t each = packed.queries + 2, heads = packed.groups * each, half = args.half, width = packed.width;
  const int lanes = blockDim.x;
  Vec<float, N> sums[2][PARTS][KINDS];
#pragma unroll
  for (int which = 0; which < 2; ++which)
#pragma unroll
    for (int i = 0; i < PARTS; ++i)
#pragma unroll
      for (int kind = 0; kind < KINDS; ++kind)
#pragma unroll
        for (int j = 0; j < N; ++j) sums[which][i][kind].at[j] = 0.0f;

  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.z; first < packed.tokens;
       first += static_cast<int64_t>(gridDim.x) * blockDim.z) {
    const int64_t token = first + threadIdx.z;
    for (int64_t begin = 0; begin < heads; begin += blockDim.y) {
      const int64_t number = begin + threadIdx.y;
      const bool here = token < packed.tokens && number < heads;
      const Place place = place_of(here ? number : 0, each);
      const bool is_value = place.in_group == packed.queries + 1, is_key = place.in_group == packed.queries;
      T* to = static_cast<T*>(args.grad_qkv) + (token * heads + number) * width;
      const bool turns = here && !is_value;
      const void* weight = is_key ? args.k_weight : args.q_weight;
      const T* x = static_cast<const T*>(args.qkv) + (here ? token : 0) * packed.token_stride +
                   place.group * packed.group_stride + place.in_group * packed.head_stride;
      float rstd = 0.0f, total = 0.0f;
      Vec<float, N> scaled[PARTS][KINDS], normed[PARTS][KINDS];
      if (turns) {
        const int64_t key = token * packed.groups + place.group;
        rstd = is_key ? args.k_rstd[key] : args.q_rstd[key * packed.queries + place.in_group];
        const T* grad = is_key ? head_of<T>(args.grad_k, token, place.group)
                               : head_of<T>(args.grad_q, token, place.group * packed.queries + place.in_group);
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
          const int64_t low = column_of<N>(half, width, i, 0);
          if (low >= 0) turn_back(args, grad, token, low, scaled[i][0], scaled[i][1]);
          if constexpr (KINDS == 3) {
            const int64_t beyond = column_of<N>(half, width, i, 2);
            if (beyond >= 0) scaled[i][2] = widen(load<N>(grad + beyond));
          }
#pragma unroll
          for (int kind = 0; kind < KINDS; ++kind) {
            const int64_t column = column_of<N>(half, width, i, kind);
            if (column < 0) continue;
            normed[i][kind] = widen(load<N>(x + column));
            const auto factor = load_any<N>(weight, args.weight_type, column);
#pragma unroll
            for (int j = 0; j < N; ++j) {
              normed[i][kind].at[j] *= rstd;
              const float product = scaled[i][kind].at[j] * normed[i][kind].at[j];
              sums[0][i][kind].at[j] += is_key ? 0.0f : product;
              sums[1][i][kind].at[j] += is_key ? product : 0.0f;
              scaled[i][kind].at[j] *= args.offset + factor.at[j];
              total += scaled[i][kind].at[j] * normed[i][kind].at[j];
            }
          }
        }
      }
      const float mean = row_sum(total, lanes, nullptr) / static_cast<float>(width);
      if (here && is_value) {
        const T* grad = head_of<T>(args.grad_v, token, place.group);
        for (int64_t column = static_cast<int64_t>(threadIdx.x) * N; column < width; column += blockDim.x * N)
          store_whole(to + column, load<N>(grad + column));
      }
      if (!turns) continue;
#pragma unroll
      for (int i = 0; i < PARTS; ++i) {
#pragma unroll
        for (int kind = 0; kind < KINDS; ++kind) {
          const int64_t column = column_of<N>(half, width, i, kind);
          if (column < 0) continue;
          Vec<float, N> result;
#pragma unroll
          for (int j = 0; j < N; ++j)
            result.at[j] = (scaled[i][kind].at[j] - normed[i][kind].at[j] * mean) * rstd;
          store_whole(to + column, narrow<T>(result));
        }
      }
    }
  }
  if (args.partials == nullptr) return;
  const int row = threadIdx.z * blockDim.y + threadIdx.y, rows = blockDim.y * blockDim.z;
#pragma unroll
  for (int which = 0; which < 2; ++which)
#pragma unroll
    for (int i = 0; i < PARTS; ++i)
#pragma unroll
      for (int kind = 0; kind < KINDS; ++kind) {
        const int64_t column = column_of<N>(half, width, i, kind);
        if (column < 0) continue;
#pragma unroll
        for (int j = 0; j < N; ++j) of_rows[(row * 2 + which) * width + column + j] = sums[which][i][kind].at[j];
      }
  __syncthreads();
  for (int64_t column = static_cast<int64_t>(row) * lanes + threadIdx.x; column < 2 * width;
       column += static_cast<int64_t>(rows) * lanes) {
    float sum = 0.0f;
    for (int one = 0; one < rows; ++one) sum += of_rows[one * 2 * width + column];
    args.partials[blockIdx.x * 2 * width + column] = sum;
  }
}

// Sum over the rows of `partials`; one warp for 32 columns would leave most of the GPU idle, so 8 share each column.
__global__ void __launch_bounds__(THREADS) columns_kernel(const float* partials, int64_t count, int64_t width,
                                                         float* sums) {
  __shared__ float shared[8][33];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  float sum = 0.0f;
  if (column < width)
    for (int64_t row = threadIdx.y; row < count; row += 8) sum += partials[row * width + column];
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= width) return;
  for (int slice = 1; slice < 8; ++slice) sum += shared[slice][threadIdx.x];
  sums[column] = sum;
}

unsigned power_of_two(int64_t value, unsigned most) {
  unsigned result = 1;
  while (result < most && result < value) result *= 2;
  return result;
}

struct Shape {
  bool vectors;
  dim3 block;
};

Shape shape_of(const Packed& packed, int64_t half, Type type, int64_t heads, bool vectors) {
  const int64_t step = vectors ? (type == Type::f32 ? 4 : 8) : 1;
  const int64_t pairs = std::max<int64_t>(half, packed.width - 2 * half) / step;
  const unsigned lanes = power_of_two(std::max<int64_t>(1, pairs), COLUMNS);
  const unsigned rows = power_of_two(heads, THREADS / lanes);
  return {vectors, dim3(lanes, rows, std::min(THREADS / (lanes * rows), 64u))};
}

bool in_steps(const Packed& packed, int64_t half, int64_t step) {
  return half % step == 0 && packed.width % step == 0 && packed.token_stride % step == 0 &&
         packed.group_stride % step == 0 && packed.head_stride % step == 0;
}

template <class T, class Task>
void turn(const Task& task, bool vectors, Stream stream) {
  constexpr int N = 16 / sizeof(T);
  const Packed& packed = task.args.packed;
  const int64_t step = vectors ? N : 1, heads = packed.groups * task.each();
  const int64_t pairs = std::max(task.args.half, packed.width - 2 * task.args.half) / step;
  const unsigned lanes = power_of_two(std::max<int64_t>(1, pairs), COLUMNS);
  const unsigned rows = static_cast<unsigned>(std::min<int64_t>((heads + HEADS - 1) / HEADS, THREADS / lanes));
  const dim3 block(lanes, rows, std::min(THREADS / (lanes * rows), 64u));
  if (vectors) {
    turn_kernel<T, N><<<grid(packed.tokens, block.z), block, 0, stream>>>(task);
  } else {
    turn_kernel<T, 1><<<grid(packed.tokens, block.z), block, 0, stream>>>(task);
  }
}

Shape backward_shape(const RopeQkBackward& args) {
  const Packed& packed = args.packed;
  const int64_t step = args.type == Type::f32 ? 4 : 8;
  bool vectors = in_steps(packed, args.half, step) &&
                 aligned({args.qkv, args.cos, args.sin, args.q_weight, args.k_weight, args.grad_qkv});
  for (const Heads* heads : {&args.grad_q, &args.grad_k, &args.grad_v})
    vectors = vectors && aligned({heads->data}) && heads->token_stride % step == 0 && heads->head_stride % step == 0;
  return shape_of(packed, args.half, args.type, packed.groups * (packed.queries + 2), vectors);
}

}  // namespace

int rope_qk(const RopeQk& args, Stream stream) {
  const Packed& packed = args.packed;
  const int64_t heads = packed.groups * (packed.queries + 1);
  if (packed.tokens == 0 || heads == 0 || packed.width == 0) return 0;
  with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    const bool vectors = in_steps(packed, args.half, N) &&
                         aligned({args.qkv, args.cos, args.sin, args.q_weight, args.k_weight, args.q, args.k});
    if (args.q_weight == nullptr) return turn<T>(Apart<T>{args}, vectors, stream);
    const Shape shape = shape_of(packed, args.half, args.type, heads, vectors);
    const unsigned blocks = grid(packed.tokens, shape.block.z);
    if (vectors) {
      forward_kernel<T, N><<<blocks, shape.block, 0, stream>>>(args);
    } else {
      forward_kernel<T, 1><<<blocks, shape.block, 0, stream>>>(args);
    }
  });
  return launched();
}

int64_t rope_qk_partials(const RopeQkBackward& args) {
  const Shape shape = backward_shape(args);
  // As many blocks as are at work at the same time, with the registers that sums need.
  return std::min<int64_t>(grid(args.packed.tokens, shape.block.z), 2 * multiprocessors());
}

int rope_qk_backward(const RopeQkBackward& args, Stream stream) {
  const Packed& packed = args.packed;
  const bool any = packed.tokens != 0 && packed.groups != 0 && packed.width != 0;
  const int64_t most = rope_qk_partials(args);
  if (any) {
    const Shape shape = backward_shape(args);
    const bool norm = args.q_weight != nullptr;
    if (norm && std::max(args.half, packed.width - 2 * args.half) > ROPE_QK_NORM)
      return static_cast<int>(cudaErrorInvalidValue);
    with_type(args.type, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      constexpr int N = 16 / sizeof(T);
      if (norm) {
        const size_t rows = shape.block.y * shape.block.z;
        const size_t shared = args.partials == nullptr ? 0 : rows * 2 * packed.width * sizeof(float);
        const unsigned blocks = static_cast<unsigned>(most);
        const bool whole = 2 * args.half == packed.width;
        if (shape.vectors && whole) {
          norm_backward_kernel<T, N, 2><<<blocks, shape.block, shared, stream>>>(args);
        } else if (shape.vectors) {
          norm_backward_kernel<T, N, 3><<<blocks, shape.block, shared, stream>>>(args);
        } else {
          norm_backward_kernel<T, 1, 3><<<blocks, shape.block, shared, stream>>>(args);
        }
      } else {
        turn<T>(Together<T>{args}, shape.vectors, stream);
      }
    });
    if (const int error = launched()) return error;
  }
  if (args.partials == nullptr || packed.width == 0) return 0;
  const int64_t columns = 2 * packed.width;
  columns_kernel<<<grid(columns, 32), dim3(32, 8), 0, stream>>>(args.partials, any ? most : 0, columns,
                                                               args.grad_weight);
  return launched();
}

}  // namespace megatune::cuda
