// Root-mean-square norm, forward and backward, with the residual's addition in the same pass if asked for.
//
// A row is shared by some lanes of a warp (short rows, several in a block) or by a whole block. Each thread keeps up to
// CACHED vectors of its row in registers; of rows longer than that the rest is read a second time, from the cache.

#include "../common/launch.cuh"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"

namespace megatune::cuda {

namespace {

constexpr int CACHED = 4;
constexpr int SHORT_THREADS = 256;    // of a block that has several rows
constexpr int FORWARD_THREADS = 1024;
constexpr int BACKWARD_THREADS = 384;  // it keeps three values of each element: up to 168 registers a thread

// x + residual as it is stored, which is what the norm is of.
template <class T, int N>
__device__ Vec<T, N> added(const Vec<T, N>& x, const Vec<T, N>& residual) {
  Vec<T, N> sum;
#pragma unroll
  for (int i = 0; i < N; ++i) sum.at[i] = from_float<T>(to_float(x.at[i]) + to_float(residual.at[i]));
  return sum;
}

template <class T, int N>
__device__ float squares(const Vec<T, N>& x) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) sum += to_float(x.at[i]) * to_float(x.at[i]);
  return sum;
}

template <class T, int N>
__device__ Vec<T, N> normalised(const RmsNorm& args, const Vec<T, N>& x, float rstd, int column) {
  const Vec<float, N> weight = load_any<N>(args.weight, args.weight_type, column);
  Vec<T, N> y;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float value = to_float(x.at[i]) * rstd;
    if (args.round_first) value = to_float(from_float<T>(value));
    y.at[i] = from_float<T>(value * (args.offset + weight.at[i]));
  }
  return y;
}

template <class T, int N>
__global__ void __launch_bounds__(FORWARD_THREADS) forward_kernel(const RmsNorm args, int64_t rows) {
  __shared__ float shared[32];
  const int vectors = static_cast<int>(args.width / N);
  const int threads = blockDim.x;
  // All threads of a block go through the loop equally often: they add up together.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < rows;
       first += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t row = first + threadIdx.y;
    const bool here = row < rows;
    const T* x = static_cast<const T*>(args.x) + offset_of(args.rows, here ? row : 0);
    T* y = static_cast<T*>(args.y) + row * args.width;
    const T* residual = nullptr;
    if (args.residual != nullptr)
      residual = static_cast<const T*>(args.residual) + offset_of(args.residual_rows, here ? row : 0);
    T* sum = static_cast<T*>(args.sum) + row * args.width;

    Vec<T, N> cached[CACHED];
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < CACHED; ++i) {
      const int at = threadIdx.x + i * threads;
      if (here && at < vectors) cached[i] = load<N>(x + at * N);
    }
    if (residual != nullptr) {
#pragma unroll
      for (int i = 0; i < CACHED; ++i) {
        const int at = threadIdx.x + i * threads;
        if (here && at < vectors) {
          cached[i] = added(cached[i], load<N>(residual + at * N));
          store(sum + at * N, cached[i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < CACHED; ++i)
      if (here && static_cast<int>(threadIdx.x) + i * threads < vectors) total += squares(cached[i]);
    if (here) {
      for (int at = threadIdx.x + CACHED * threads; at < vectors; at += threads) {
        Vec<T, N> values = load<N>(x + at * N);
        if (residual != nullptr) {
          values = added(values, load<N>(residual + at * N));
          store(sum + at * N, values);
        }
        total += squares(values);
      }
    }
    total = row_sum(total, threads, shared);
    if (!here) continue;
    const float rstd = rsqrtf(total / static_cast<float>(args.width) + args.eps);
    if (threadIdx.x == 0) args.rstd[row] = rstd;
#pragma unroll
    for (int i = 0; i < CACHED; ++i) {
      const int at = threadIdx.x + i * threads;
      if (at < vectors) store(y + at * N, normalised(args, cached[i], rstd, at * N));
    }
    // What this thread wrote to `sum` it may read again; nobody else's.
    const T* again = residual != nullptr ? sum : x;
    for (int at = threadIdx.x + CACHED * threads; at < vectors; at += threads)
      store(y + at * N, normalised(args, load<N>(again + at * N), rstd, at * N));
  }
}

// grad_x = rstd * (g - h * mean(g * h)), with h = x * rstd and g = grad * (offset + weight).
template <class T, int N>
__device__ float products(const RmsNormBackward& args, const Vec<T, N>& grad, const Vec<T, N>& x, float rstd,
                          int column) {
  const Vec<float, N> weight = load_any<N>(args.weight, args.weight_type, column);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) sum += to_float(grad.at[i]) * (args.offset + weight.at[i]) * (to_float(x.at[i]) * rstd);
  return sum;
}

template <class T, int N>
__device__ void write_grad(const RmsNormBackward& args, const Vec<T, N>& grad, const Vec<T, N>& x, float rstd,
                           float mean, int64_t row, int column) {
  const Vec<float, N> weight = load_any<N>(args.weight, args.weight_type, column);
  const int64_t place = row * args.width + column;
  Vec<float, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float scaled = to_float(grad.at[i]) * (args.offset + weight.at[i]);
    result.at[i] = (scaled - to_float(x.at[i]) * rstd * mean) * rstd;
  }
  if (args.grad_sum != nullptr) {
    const auto more = load<N>(static_cast<const T*>(args.grad_sum) + place);
#pragma unroll
    for (int i = 0; i < N; ++i) result.at[i] += to_float(more.at[i]);
  }
  Vec<T, N> rounded;
#pragma unroll
  for (int i = 0; i < N; ++i) rounded.at[i] = from_float<T>(result.at[i]);
  store(static_cast<T*>(args.grad_x) + place, rounded);
}

// Each block takes every gridDim.x-th group of rows and leaves its sum of grad * h in one row of `partials`.
template <class T, int N>
__global__ void __launch_bounds__(BACKWARD_THREADS) backward_kernel(const RmsNormBackward args, int64_t rows) {
  __shared__ float shared[32];
  extern __shared__ float of_groups[];  // [blockDim.y, width] where a block has several rows
  const int vectors = static_cast<int>(args.width / N);
  const int threads = blockDim.x;
  float* partial = args.partials == nullptr ? nullptr : args.partials + blockIdx.x * args.width;
  Vec<float, N> sums[CACHED];
#pragma unroll
  for (int i = 0; i < CACHED; ++i)
#pragma unroll
    for (int j = 0; j < N; ++j) sums[i].at[j] = 0.0f;

  bool begun = false;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < rows;
       first += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t row = first + threadIdx.y;
    const bool here = row < rows;
    const T* x = static_cast<const T*>(args.x) + offset_of(args.rows, here ? row : 0);
    const T* grad = static_cast<const T*>(args.grad) + row * args.width;
    const float rstd = here ? args.rstd[row] : 0.0f;
    Vec<T, N> cached_x[CACHED], cached_grad[CACHED];
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < CACHED; ++i) {
      const int at = threadIdx.x + i * threads;
      if (here && at < vectors) {
        cached_x[i] = load<N>(x + at * N);
        cached_grad[i] = load<N>(grad + at * N);
      }
    }
#pragma unroll
    for (int i = 0; i < CACHED; ++i) {
      const int at = threadIdx.x + i * threads;
      if (here && at < vectors) {
        total += products(args, cached_grad[i], cached_x[i], rstd, at * N);
#pragma unroll
        for (int j = 0; j < N; ++j)
          sums[i].at[j] += to_float(cached_grad[i].at[j]) * (to_float(cached_x[i].at[j]) * rstd);
      }
    }
    if (here) {
      for (int at = threadIdx.x + CACHED * threads; at < vectors; at += threads)
        total += products(args, load<N>(grad + at * N), load<N>(x + at * N), rstd, at * N);
    }
    const float mean = row_sum(total, threads, shared) / static_cast<float>(args.width);
    if (!here) continue;
#pragma unroll
    for (int i = 0; i < CACHED; ++i) {
      const int at = threadIdx.x + i * threads;
      if (at < vectors) write_grad(args, cached_grad[i], cached_x[i], rstd, mean, row, at * N);
    }
    for (int at = threadIdx.x + CACHED * threads; at < vectors; at += threads) {
      const auto far_x = load<N>(x + at * N), far_grad = load<N>(grad + at * N);
      write_grad(args, far_grad, far_x, rstd, mean, row, at * N);
      if (partial != nullptr) {
        // These sums do not fit into registers; the thread has them for itself in the block's row.
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const float product = to_float(far_grad.at[j]) * (to_float(far_x.at[j]) * rstd);
          partial[at * N + j] = begun ? partial[at * N + j] + product : product;
        }
      }
    }
    begun = true;
  }
  if (partial == nullptr) return;
  float* to = blockDim.y == 1 ? partial : of_groups + threadIdx.y * args.width;
#pragma unroll
  for (int i = 0; i < CACHED; ++i) {
    const int at = threadIdx.x + i * threads;
    if (at < vectors) {
#pragma unroll
      for (int j = 0; j < N; ++j) to[at * N + j] = sums[i].at[j];
    }
  }
  if (blockDim.y == 1) return;
  __syncthreads();
  for (int64_t column = threadIdx.y * threads + threadIdx.x; column < args.width; column += blockDim.y * threads) {
    float sum = 0.0f;
    for (int group = 0; group < blockDim.y; ++group) sum += of_groups[group * args.width + column];
    partial[column] = sum;
  }
}

constexpr int COLUMNS = 32, SLICES = 16;

// Second stage: the sum over the rows of `partials`, for 32 columns in a block; 16 threads share a column.
__global__ void __launch_bounds__(COLUMNS * SLICES) columns_kernel(const float* partials, int64_t count, int64_t width,
                                                                   float* sums) {
  __shared__ float shared[SLICES][COLUMNS + 1];
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * COLUMNS; first < width;
       first += static_cast<int64_t>(gridDim.x) * COLUMNS) {
    const int64_t column = first + threadIdx.x;
    float sum = 0.0f;
    if (column < width)
      for (int64_t row = threadIdx.y; row < count; row += SLICES) sum += partials[row * width + column];
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
};

Shape shape_of(Type type, bool vectors, int64_t width, int most) {
  const int elements = !vectors ? 1 : type == Type::f32 ? 4 : 8;
  const int64_t count = width / elements;
  if (count <= 32 * CACHED) {
    unsigned lanes = 1;
    while (lanes < 32 && lanes < count) lanes *= 2;
    return {elements, dim3(lanes, SHORT_THREADS / lanes)};
  }
  const int64_t threads = (count + CACHED * 32 - 1) / (CACHED * 32) * 32;
  return {elements, dim3(static_cast<unsigned>(std::min<int64_t>(threads, most)), 1)};
}

Shape forward_shape(const RmsNorm& args) {
  const int step = args.type == Type::f32 ? 4 : 8;
  const bool vectors = args.width % step == 0 && in_steps(args.rows, step) && in_steps(args.residual_rows, step) &&
                       aligned({args.x, args.residual, args.sum, args.weight, args.y});
  return shape_of(args.type, vectors, args.width, FORWARD_THREADS);
}

Shape backward_shape(const RmsNormBackward& args) {
  const int step = args.type == Type::f32 ? 4 : 8;
  const bool vectors = args.width % step == 0 && in_steps(args.rows, step) &&
                       aligned({args.grad, args.x, args.grad_sum, args.weight, args.grad_x});
  return shape_of(args.type, vectors, args.width, BACKWARD_THREADS);
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
    if (shape.elements == 1) {
      forward_kernel<T, 1><<<blocks, shape.block, 0, stream>>>(args, rows);
    } else {
      forward_kernel<T, 16 / sizeof(T)><<<blocks, shape.block, 0, stream>>>(args, rows);
    }
  });
  return launched();
}

int64_t rms_norm_partials(const RmsNormBackward& args) {
  const Shape shape = backward_shape(args);
  // As many blocks as are at work at the same time: a multiprocessor has registers for so many threads.
  const int64_t each = std::max<int64_t>(1, BACKWARD_THREADS / (shape.block.x * shape.block.y));
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
    const size_t shared = shape.block.y == 1 ? 0 : shape.block.y * args.width * sizeof(float);
    with_type(args.type, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      if (shape.elements == 1) {
        backward_kernel<T, 1><<<blocks, shape.block, shared, stream>>>(args, rows);
      } else {
        backward_kernel<T, 16 / sizeof(T)><<<blocks, shape.block, shared, stream>>>(args, rows);
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
