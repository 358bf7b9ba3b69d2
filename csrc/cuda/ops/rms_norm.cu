// Root-mean-square norm, forward and backward, with the residual's addition in the same pass if asked for.
//
// A row is shared by some lanes of a warp (short rows, several in a block) or by a whole block. Each thread keeps some
// vectors of its row in registers; of rows longer than that the rest is read a second time, from the cache. All that a
// thread reads is asked for before anything is written: the compiler moves no load before a store.

#include "../common/launch.cuh"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"

namespace megatune::cuda {

namespace {

constexpr int SHORT_THREADS = 256;  // of a block that has several rows
constexpr int FORWARD_THREADS = 1024;
constexpr int FORWARD_KEPT = 4, FORWARD_SUM_KEPT = 2;  // without and with a residual
constexpr int BACKWARD_THREADS = 512;  // up to 128 registers
constexpr int BACKWARD_KEPT = 4;
// Backward of rows that are fetched ahead: the most threads of a row, vectors of a thread, rows in shared memory
// (the one at work too), and threads of a multiprocessor (more of them: more partial sums).
constexpr int AHEAD_THREADS = 1024, AHEAD_KEPT = 1, AHEAD_STAGES = 2, AHEAD_RESIDENT = 1024;

// x + residual as it is stored, which is what the norm is of.
template <class T, int N>
__device__ Vec<T, N> added(const Vec<T, N>& x, const Vec<T, N>& residual) {
  Vec<float, N> sum = widen(x);
  const auto more = widen(residual);
#pragma unroll
  for (int i = 0; i < N; ++i) sum.at[i] += more.at[i];
  return narrow<T>(sum);
}

template <class T, int N>
__device__ float squares(const Vec<T, N>& x) {
  const auto wide = widen(x);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) sum += wide.at[i] * wide.at[i];
  return sum;
}

// weight: N elements from `column` on.
template <class T, int N>
__device__ Vec<T, N> normalised(const RmsNorm& args, const Vec<T, N>& x, float rstd, const Vec<float, N>& weight) {
  Vec<float, N> y = widen(x);
#pragma unroll
  for (int i = 0; i < N; ++i) y.at[i] *= rstd;
  if (args.round_first) y = widen(narrow<T>(y));
#pragma unroll
  for (int i = 0; i < N; ++i) y.at[i] *= args.offset + weight.at[i];
  return narrow<T>(y);
}

// FAR: rows may be longer than what the threads keep.
template <class T, int N, int KEPT, bool FAR>
__global__ void __launch_bounds__(FORWARD_THREADS) forward_kernel(const RmsNorm args, int64_t rows) {
  __shared__ float shared[32];
  const int vectors = static_cast<int>(args.width / N);
  const int threads = blockDim.x, lane = threadIdx.x;
  // All threads of a block go through the loop equally often: they add up together.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < rows;
       first += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t row = first + threadIdx.y;
    const bool here = row < rows;
    const int mine = here ? vectors : 0;
    const T* x = static_cast<const T*>(args.x) + offset_of(args.rows, here ? row : 0);
    T* y = static_cast<T*>(args.y) + row * args.width;
    const T* residual = nullptr;
    if (args.residual != nullptr)
      residual = static_cast<const T*>(args.residual) + offset_of(args.residual_rows, here ? row : 0);
    T* sum = static_cast<T*>(args.sum) + row * args.width;

    Vec<T, N> cached[KEPT];
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < KEPT; ++i)
      if (lane + i * threads < mine) cached[i] = load<N>(x + (lane + i * threads) * N);
    if (residual != nullptr) {
      Vec<T, N> more[KEPT];
#pragma unroll
      for (int i = 0; i < KEPT; ++i)
        if (lane + i * threads < mine) more[i] = load<N>(residual + (lane + i * threads) * N);
#pragma unroll
      for (int i = 0; i < KEPT; ++i) {
        if (lane + i * threads < mine) {
          cached[i] = added(cached[i], more[i]);
          store_whole(sum + (lane + i * threads) * N, cached[i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < KEPT; ++i)
      if (lane + i * threads < mine) total += squares(cached[i]);
    for (int at = lane + KEPT * threads; FAR && at < mine; at += threads) {
      Vec<T, N> values = load<N>(x + at * N);
      if (residual != nullptr) {
        values = added(values, load<N>(residual + at * N));
        store_whole(sum + at * N, values);
      }
      total += squares(values);
    }
    total = row_sum(total, threads, shared);
    if (!here) continue;
    const float rstd = rsqrtf(total / static_cast<float>(args.width) + args.eps);
    if (lane == 0) args.rstd[row] = rstd;
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
      const int column = (lane + i * threads) * N;
      if (lane + i * threads < mine)
        store_whole(y + column, normalised(args, cached[i], rstd,
                                     load_any<N>(args.weight, args.weight_type, column)));
    }
    // What this thread wrote to `sum` it may read again; nobody else's.
    const T* again = residual != nullptr ? sum : x;
    for (int at = lane + KEPT * threads; FAR && at < mine; at += threads) {
      const auto far = load_any<N>(args.weight, args.weight_type, at * N);
      store_whole(y + at * N, normalised(args, load<N>(again + at * N), rstd, far));
    }
  }
}

// offset + weight, of N columns.
template <int N>
__device__ Vec<float, N> factors(const RmsNormBackward& args, int column) {
  Vec<float, N> result = load_any<N>(args.weight, args.weight_type, column);
#pragma unroll
  for (int i = 0; i < N; ++i) result.at[i] += args.offset;
  return result;
}

// grad_x = rstd * (g - h * mean(g * h)) + more, with h = x * rstd and g = grad * factor.
template <class T, int N, bool MORE>
__device__ Vec<T, N> input_grad(const Vec<T, N>& grad, const Vec<T, N>& x, const Vec<T, N>& more,
                                const Vec<float, N>& factor, float rstd, float mean) {
  const auto wide_grad = widen(grad), wide_x = widen(x);
  Vec<float, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result.at[i] = (wide_grad.at[i] * factor.at[i] - wide_x.at[i] * rstd * mean) * rstd;
  if constexpr (MORE) {
    const auto wide_more = widen(more);
#pragma unroll
    for (int i = 0; i < N; ++i) result.at[i] += wide_more.at[i];
  }
  return narrow<T>(result);
}

// The columns beyond those that threads keep: their part of sum(g * h).
template <class T, int N>
__device__ float far_total(const RmsNormBackward& args, int64_t row, int first, int mine, float rstd) {
  if (first >= mine) return 0.0f;
  const T* x = static_cast<const T*>(args.x) + offset_of(args.rows, row);
  const T* grad = static_cast<const T*>(args.grad) + row * args.width;
  float total = 0.0f;
  for (int at = first; at < mine; at += blockDim.x) {
    const auto far_x = widen(load<N>(x + at * N)), far_grad = widen(load<N>(grad + at * N));
    const auto factor = factors<N>(args, at * N);
#pragma unroll
    for (int j = 0; j < N; ++j) total += far_grad.at[j] * factor.at[j] * (far_x.at[j] * rstd);
  }
  return total;
}

// Their gradients. The sums for the weight do not fit into registers; the thread has them to itself in the row of the block.
template <class T, int N, bool MORE>
__device__ void far_grads(const RmsNormBackward& args, int64_t row, int first, int mine, float rstd, float mean,
                          float* partial, bool begun) {
  if (first >= mine) return;
  const T* x = static_cast<const T*>(args.x) + offset_of(args.rows, row);
  const int64_t begin = row * args.width;
  for (int at = first; at < mine; at += blockDim.x) {
    const auto far_x = load<N>(x + at * N), far_grad = load<N>(static_cast<const T*>(args.grad) + begin + at * N);
    Vec<T, N> more;
    if constexpr (MORE) more = load<N>(static_cast<const T*>(args.grad_sum) + begin + at * N);
    store_whole(static_cast<T*>(args.grad_x) + begin + at * N,
          input_grad<T, N, MORE>(far_grad, far_x, more, factors<N>(args, at * N), rstd, mean));
    if (partial == nullptr) continue;
    const auto wide_x = widen(far_x), wide_grad = widen(far_grad);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float product = wide_grad.at[j] * (wide_x.at[j] * rstd);
      partial[at * N + j] = begun ? partial[at * N + j] + product : product;
    }
  }
}

// What the groups of a block have added up, [blockDim.y, width], to one row.
__device__ void sum_of_groups(const float* of_groups, int64_t width, float* partial) {
  __syncthreads();
  const int all = blockDim.x * blockDim.y;
  for (int64_t column = threadIdx.y * blockDim.x + threadIdx.x; column < width; column += all) {
    float sum = 0.0f;
    for (int group = 0; group < blockDim.y; ++group) sum += of_groups[group * width + column];
    partial[column] = sum;
  }
}

// 16 bytes from global to shared memory; done when this thread has waited for their group.
__device__ inline void fetch(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}

// Each block takes every gridDim.x-th group of rows and leaves its sum of grad * h in one row of `partials`.
// HELD: the weight has the type of the rows and stays in registers; for rows that threads keep.
template <class T, int N, int KEPT, bool MORE, bool HELD>
__global__ void __launch_bounds__(BACKWARD_THREADS) backward_kernel(const RmsNormBackward args, int64_t rows) {
  __shared__ float shared[2][32];
  extern __shared__ float of_groups[];  // [blockDim.y, width] where a block has several rows
  const int vectors = static_cast<int>(args.width / N);
  const int threads = blockDim.x, lane = threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  float* partial = args.partials == nullptr ? nullptr : args.partials + blockIdx.x * args.width;
  Vec<float, N> sums[KEPT];
  Vec<T, N> held[HELD ? KEPT : 1];
#pragma unroll
  for (int i = 0; i < KEPT; ++i) {
#pragma unroll
    for (int j = 0; j < N; ++j) sums[i].at[j] = 0.0f;
    if constexpr (HELD) {
      const int at = lane + i * threads;
      if (at < vectors) held[i] = load<N>(static_cast<const T*>(args.weight) + at * N);
    }
  }
  const auto factor_of = [&](int i) {
    if constexpr (!HELD) return factors<N>(args, (lane + i * threads) * N);
    Vec<float, N> result = widen(held[HELD ? i : 0]);
#pragma unroll
    for (int j = 0; j < N; ++j) result.at[j] += args.offset;
    return result;
  };

  int turn = 0;
  int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < rows; first += step, row += step) {
    const int mine = row < rows ? vectors : 0;
    const T* x = static_cast<const T*>(args.x) + offset_of(args.rows, mine > 0 ? row : 0);
    const T* grad = static_cast<const T*>(args.grad) + row * args.width;
    Vec<T, N> near_x[KEPT], near_grad[KEPT], more[MORE ? KEPT : 1];
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
      const int at = lane + i * threads;
      if (at < mine) near_x[i] = load<N>(x + at * N), near_grad[i] = load<N>(grad + at * N);
    }
    if constexpr (MORE) {
#pragma unroll
      for (int i = 0; i < KEPT; ++i) {
        const int at = lane + i * threads;
        if (at < mine) more[i] = load<N>(static_cast<const T*>(args.grad_sum) + row * args.width + at * N);
      }
    }
    const float rstd = mine > 0 ? args.rstd[row] : 0.0f;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
      if (lane + i * threads < mine) {
        const auto factor = factor_of(i), wide_x = widen(near_x[i]), wide_grad = widen(near_grad[i]);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const float product = wide_grad.at[j] * (wide_x.at[j] * rstd);
          sums[i].at[j] += product;
          total += product * factor.at[j];
        }
      }
    }
    if constexpr (!HELD) total += far_total<T, N>(args, row, lane + KEPT * threads, mine, rstd);
    const float mean = row_sum<true>(total, threads, shared[turn % 2]) / static_cast<float>(args.width);
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
      const int at = lane + i * threads;
      if (at >= mine) continue;
      store_whole(static_cast<T*>(args.grad_x) + row * args.width + at * N,
            input_grad<T, N, MORE>(near_grad[i], near_x[i], more[MORE ? i : 0], factor_of(i), rstd, mean));
    }
    if constexpr (!HELD)
      far_grads<T, N, MORE>(args, row, lane + KEPT * threads, mine, rstd, mean, partial, turn > 0);
    ++turn;
  }
  if (partial == nullptr) return;
  float* to = blockDim.y == 1 ? partial : of_groups + threadIdx.y * args.width;
#pragma unroll
  for (int i = 0; i < KEPT; ++i) {
    const int at = lane + i * threads;
    if (at < vectors) {
#pragma unroll
      for (int j = 0; j < N; ++j) to[at * N + j] = sums[i].at[j];
    }
  }
  if (blockDim.y == 1) return;
  sum_of_groups(of_groups, args.width, partial);
}

// As `backward_kernel` for rows that threads keep and a weight of their type, but the rows after the one at work are on
// their way into shared memory meanwhile. A thread reads only what it has fetched itself: that needs no barrier.
template <class T, bool MORE>
__global__ void __launch_bounds__(AHEAD_THREADS) backward_ahead_kernel(const RmsNormBackward args, int64_t rows) {
  constexpr int N = 16 / sizeof(T), KEPT = AHEAD_KEPT, STAGES = AHEAD_STAGES, ARRAYS = MORE ? 3 : 2;
  __shared__ float shared[2][32];
  extern __shared__ int4 ahead[];  // [stage, array, i, thread]; in the end float [blockDim.y, width]
  const int vectors = static_cast<int>(args.width / N);
  const int threads = blockDim.x, lane = threadIdx.x, all = blockDim.x * blockDim.y;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  int4* own = ahead + threadIdx.y * threads + lane;
  const auto slot = [&](int stage, int array, int i) { return own + ((stage * ARRAYS + array) * KEPT + i) * all; };
  const auto fetch_row = [&](int64_t row, int stage) {
    if (row < rows) {
      const T* x = static_cast<const T*>(args.x) + offset_of(args.rows, row);
      const int64_t begin = row * args.width;
#pragma unroll
      for (int i = 0; i < KEPT; ++i) {
        const int at = lane + i * threads;
        if (at >= vectors) continue;
        fetch(slot(stage, 0, i), x + at * N);
        fetch(slot(stage, 1, i), static_cast<const T*>(args.grad) + begin + at * N);
        if constexpr (MORE) fetch(slot(stage, 2, i), static_cast<const T*>(args.grad_sum) + begin + at * N);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");  // empty ones count too
  };
  int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) fetch_row(row + stage * step, stage);

  Vec<T, N> held[KEPT];
  Vec<float, N> sums[KEPT];
#pragma unroll
  for (int i = 0; i < KEPT; ++i) {
#pragma unroll
    for (int j = 0; j < N; ++j) sums[i].at[j] = 0.0f;
    const int at = lane + i * threads;
    if (at < vectors) held[i] = load<N>(static_cast<const T*>(args.weight) + at * N);
  }
  const auto factor_of = [&](int i) {
    Vec<float, N> result = widen(held[i]);
#pragma unroll
    for (int j = 0; j < N; ++j) result.at[j] += args.offset;
    return result;
  };

  float next = row < rows ? args.rstd[row] : 0.0f;
  int stage = 0, turn = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < rows; first += step, row += step) {
    fetch_row(row + (STAGES - 1) * step, stage == 0 ? STAGES - 1 : stage - 1);
    const float rstd = next;
    next = row + step < rows ? args.rstd[row + step] : 0.0f;
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
    const int mine = row < rows ? vectors : 0;
    Vec<T, N> near_x[KEPT], near_grad[KEPT];
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
      if (lane + i * threads >= mine) continue;
      near_x[i] = *reinterpret_cast<Vec<T, N>*>(slot(stage, 0, i));
      near_grad[i] = *reinterpret_cast<Vec<T, N>*>(slot(stage, 1, i));
      const auto factor = factor_of(i), wide_x = widen(near_x[i]), wide_grad = widen(near_grad[i]);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float product = wide_grad.at[j] * (wide_x.at[j] * rstd);
        sums[i].at[j] += product;
        total += product * factor.at[j];
      }
    }
    const float mean = row_sum<true>(total, threads, shared[turn]) / static_cast<float>(args.width);
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
      const int at = lane + i * threads;
      if (at >= mine) continue;
      Vec<T, N> more;
      if constexpr (MORE) more = *reinterpret_cast<Vec<T, N>*>(slot(stage, 2, i));
      store_whole(static_cast<T*>(args.grad_x) + row * args.width + at * N,
                  input_grad<T, N, MORE>(near_grad[i], near_x[i], more, factor_of(i), rstd, mean));
    }
    turn ^= 1;
    stage = stage == STAGES - 1 ? 0 : stage + 1;
  }
  if (args.partials == nullptr) return;
  float* partial = args.partials + blockIdx.x * args.width;
  float* of_groups = reinterpret_cast<float*>(ahead);
  if (blockDim.y > 1) __syncthreads();  // everyone has read the rows that were there
  float* to = blockDim.y == 1 ? partial : of_groups + threadIdx.y * args.width;
#pragma unroll
  for (int i = 0; i < KEPT; ++i) {
    const int at = lane + i * threads;
    if (at >= vectors) continue;
#pragma unroll
    for (int j = 0; j < N; j += 4) {
      const auto& sum = sums[i].at;
      *reinterpret_cast<float4*>(to + at * N + j) = make_float4(sum[j], sum[j + 1], sum[j + 2], sum[j + 3]);
    }
  }
  if (blockDim.y > 1) sum_of_groups(of_groups, args.width, partial);
}

constexpr int COLUMNS = 32, SLICES = 32;

// Second stage: the sum over the rows of `partials`, for 32 columns in a block; 32 threads share a column.
__global__ void __launch_bounds__(COLUMNS * SLICES) columns_kernel(const float* partials, int64_t count, int64_t width,
                                                                   float* sums) {
  __shared__ float shared[SLICES][COLUMNS + 1];
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * COLUMNS; first < width;
       first += static_cast<int64_t>(gridDim.x) * COLUMNS) {
    const int64_t column = first + threadIdx.x;
    float sum = 0.0f;
    if (column < width) {
#pragma unroll 8
      for (int64_t row = threadIdx.y; row < count; row += SLICES) sum += partials[row * width + column];
    }
    __syncthreads();
    shared[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < width) {
      for (int slice = 1; slice < SLICES; ++slice) sum += shared[slice][threadIdx.x];
      sums[column] = sum;
    }
  }
}

struct Shape {
  int elements;  // of a vector
  dim3 block;    // threads of a row, rows of a block
  bool whole;    // threads keep all of a row
  bool ahead;    // rows are fetched ahead (backward)
};

// For `kept` vectors a thread. few: of a short row as few threads as can keep it, not as many as it has vectors.
dim3 block_of(int64_t vectors, int kept, int most, bool few = false) {
  if (vectors <= 32 * kept) {
    unsigned lanes = 1;
    while (lanes < 32 && lanes * (few ? kept : 1) < vectors) lanes *= 2;
    return dim3(lanes, SHORT_THREADS / lanes);
  }
  return dim3(static_cast<unsigned>(std::min<int64_t>((vectors + kept * 32 - 1) / (kept * 32) * 32, most)));
}

Shape forward_shape(const RmsNorm& args) {
  const int step = args.type == Type::f32 ? 4 : 8;
  const bool vectors = args.width % step == 0 && in_steps(args.rows, step) && in_steps(args.residual_rows, step) &&
                       aligned({args.x, args.residual, args.sum, args.weight, args.y});
  const int elements = vectors ? step : 1;
  const int64_t count = args.width / elements;
  const int kept = vectors && args.residual != nullptr ? FORWARD_SUM_KEPT : FORWARD_KEPT;
  const bool whole = vectors && count <= FORWARD_THREADS * kept;
  const int each = whole || !vectors ? kept : FORWARD_SUM_KEPT;
  return {elements, block_of(count, each, FORWARD_THREADS, vectors), whole, false};
}

Shape backward_shape(const RmsNormBackward& args) {
  const int step = args.type == Type::f32 ? 4 : 8;
  const bool vectors = args.width % step == 0 && in_steps(args.rows, step) &&
                       aligned({args.grad, args.x, args.grad_sum, args.weight, args.grad_x});
  const int elements = vectors ? step : 1;
  const int64_t count = args.width / elements;
  // Between short rows and those that nearly fill a multiprocessor it is no faster (measured on an H200).
  const bool ahead = vectors && args.weight_type == args.type &&
                     (count <= 32 || (count > AHEAD_THREADS * 3 / 4 && count <= AHEAD_THREADS * AHEAD_KEPT));
  const dim3 block =
      ahead ? block_of(count, AHEAD_KEPT, AHEAD_THREADS) : block_of(count, BACKWARD_KEPT, BACKWARD_THREADS);
  return {elements, block, count <= BACKWARD_THREADS * BACKWARD_KEPT, ahead};
}

template <class T, bool MORE>
void launch_backward(const Shape& shape, const RmsNormBackward& args, int64_t rows, unsigned blocks, Stream stream) {
  constexpr int N = 16 / sizeof(T);
  const size_t shared = shape.block.y == 1 ? 0 : shape.block.y * args.width * sizeof(float);
  if (shape.ahead) {
    const auto kernel = backward_ahead_kernel<T, MORE>;
    const size_t fetched = size_t{16} * AHEAD_STAGES * (MORE ? 3 : 2) * AHEAD_KEPT * shape.block.x * shape.block.y;
    const size_t bytes = std::max(fetched, shared);
    if (bytes > 48 * 1024)
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    kernel<<<blocks, shape.block, bytes, stream>>>(args, rows);
    return;
  }
  const auto run = [&](auto kernel) { kernel<<<blocks, shape.block, shared, stream>>>(args, rows); };
  if (shape.elements == 1) {
    run(backward_kernel<T, 1, BACKWARD_KEPT, MORE, false>);
  } else if (!MORE && shape.whole && args.weight_type == args.type) {
    run(backward_kernel<T, N, BACKWARD_KEPT, false, true>);  // with more to hold, there are no registers for it
  } else {
    run(backward_kernel<T, N, BACKWARD_KEPT, MORE, false>);
  }
}

}  // namespace

int rms_norm(const RmsNorm& given, Stream stream) {
  RmsNorm args = given;
  const int64_t rows = count(args.rows);
  if (rows == 0 || args.width == 0) return 0;
  args.rows = collapsed(args.rows);
  args.residual_rows = collapsed(args.residual_rows);
  const Shape shape = forward_shape(args);
  with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const unsigned blocks = grid(rows, shape.block.y);
    constexpr int N = 16 / sizeof(T);
    if (shape.elements == 1) {
      forward_kernel<T, 1, FORWARD_KEPT, true><<<blocks, shape.block, 0, stream>>>(args, rows);
    } else if (shape.whole && args.residual == nullptr) {
      forward_kernel<T, N, FORWARD_KEPT, false><<<blocks, shape.block, 0, stream>>>(args, rows);
    } else if (shape.whole) {
      forward_kernel<T, N, FORWARD_SUM_KEPT, false><<<blocks, shape.block, 0, stream>>>(args, rows);
    } else {
      forward_kernel<T, N, FORWARD_SUM_KEPT, true><<<blocks, shape.block, 0, stream>>>(args, rows);
    }
  });
  return launched();
}

int64_t rms_norm_partials(const RmsNormBackward& args) {
  const Shape shape = backward_shape(args);
  // As many blocks as are at work at the same time: a multiprocessor has registers for so many threads.
  const int64_t resident = shape.ahead ? AHEAD_RESIDENT : BACKWARD_THREADS;
  const int64_t each = std::max<int64_t>(1, resident / (shape.block.x * shape.block.y));
  const int64_t groups = (count(args.rows) + shape.block.y - 1) / shape.block.y;
  return std::min<int64_t>(groups, multiprocessors() * each);
}

int rms_norm_backward(const RmsNormBackward& given, Stream stream) {
  RmsNormBackward args = given;
  const int64_t rows = count(args.rows);
  if (args.width == 0) return 0;
  const int64_t blocks = rms_norm_partials(args);
  args.rows = collapsed(args.rows);
  if (rows > 0) {
    const Shape shape = backward_shape(args);
    with_type(args.type, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const unsigned grid_size = static_cast<unsigned>(blocks);
      if (args.grad_sum != nullptr) {
        launch_backward<T, true>(shape, args, rows, grid_size, stream);
      } else {
        launch_backward<T, false>(shape, args, rows, grid_size, stream);
      }
    });
    if (const int error = launched()) return error;
  }
  if (args.partials == nullptr) return 0;
  columns_kernel<<<grid(args.width, COLUMNS), dim3(COLUMNS, SLICES), 0, stream>>>(args.partials, blocks, args.width,
                                                                                 args.grad_weight);
  return launched();
}

}  // namespace megatune::cuda
