// Root-mean-square norm, backward: the gradient of what was normalised, and sums of rows for that of the weight, which
// a second kernel adds up.
//
// Short rows are shared by some lanes of a warp each, which ask for the next rows before they need them. Longer ones
// come as bulk copies into rings of shared memory (Hopper), several groups of threads with a row each. What neither
// takes (very long rows, addresses that are not aligned, a weight of another type) and older devices' long rows have a
// kernel that reads each row as it comes to it.

#include "../common/barrier.cuh"
#include "../common/dependent.cuh"
#include "../common/launch.cuh"
#include "../common/reduce.cuh"
#include "../common/running.cuh"
#include "rms_norm.cuh"

namespace megatune::cuda {

namespace {

constexpr int BACKWARD_THREADS = 512;  // up to 128 registers
constexpr int BACKWARD_KEPT = 4;
// Of a block of short rows, without and with a gradient of the sum to hold; one block fills a multiprocessor.
constexpr int AHEAD_THREADS = 1024, AHEAD_SUM_THREADS = 512;
// Rings: threads of a block, vectors of a thread, rows of a group in shared memory (the one at work too; without and
// with a gradient of the sum), groups.
constexpr int RING_THREADS = 512, RING_KEPT = 2, RING_STAGES = 4, RING_SUM_STAGES = 3, RING_GROUPS = 15;

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

// Their gradients. The sums for the weight do not fit into registers; the thread has them to itself in the block's row,
// and for fp32 in another one by how much they are too large (see Running), `excess` further on.
template <class T, int N, bool MORE>
__device__ void far_grads(const RmsNormBackward& args, int64_t row, int first, int mine, float rstd, float mean,
                          float* partial, int64_t excess, bool begun) {
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
      float* to = partial + at * N + j;
      Running<T, 1> sum;
      if (begun) sum.sums.at[0] = *to;
      if constexpr (sum.EXACT)
        if (begun) sum.excess.at[0] = to[excess];
      sum.add(0, product);
      *to = sum.sums.at[0];
      if constexpr (sum.EXACT) to[excess] = sum.excess.at[0];
    }
  }
}

// What the groups of a block have added up, [blockDim.y, width], to one row.
template <class T>
__device__ void sum_of_groups(const float* of_groups, int64_t width, float* partial) {
  __syncthreads();
  const int all = blockDim.x * blockDim.y;
  for (int64_t column = threadIdx.y * blockDim.x + threadIdx.x; column < width; column += all) {
    Running<T, 1> total;
    for (int group = 0; group < blockDim.y; ++group) total.add(0, of_groups[group * width + column]);
    partial[column] = total.sums.at[0];
  }
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
  Running<T, N> sums[KEPT];
  Vec<T, N> held[HELD ? KEPT : 1];
  if constexpr (HELD) {
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
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
          sums[i].add(j, product);
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
      far_grads<T, N, MORE>(args, row, lane + KEPT * threads, mine, rstd, mean, partial, gridDim.x * args.width,
                            turn > 0);
    ++turn;
  }
  if (partial == nullptr) return;
  float* to = blockDim.y == 1 ? partial : of_groups + threadIdx.y * args.width;
#pragma unroll
  for (int i = 0; i < KEPT; ++i) {
    const int at = lane + i * threads;
    if (at < vectors) {
#pragma unroll
      for (int j = 0; j < N; ++j) to[at * N + j] = sums[i].sums.at[j];
    }
  }
  if (blockDim.y == 1) return;
  sum_of_groups<T>(of_groups, args.width, partial);
}

// Makes the compiler take a vector for another one: it would else keep what was made of the first in registers.
template <class T, int N>
__device__ void forget(Vec<T, N>& values) {
  static_assert(sizeof(values) == 16);
  int4 words;
  memcpy(&words, &values, sizeof words);
  asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
  memcpy(&values, &words, sizeof words);
}

template <class T, int N>
__device__ Vec<float, N> factor_of(const Vec<T, N>& weight, float offset) {
  Vec<float, N> result = widen(weight);
#pragma unroll
  for (int j = 0; j < N; ++j) result.at[j] += offset;
  return result;
}

// A row's part of the sum of grad * h for each column, h = x * rstd; of grad * factor * h over the columns.
template <class T, int N>
__device__ float add_row(const Vec<T, N>& x, const Vec<T, N>& grad, const Vec<T, N>& weight, float offset, float rstd,
                         Running<T, N>& sums) {
  const auto wide_x = widen(x), wide_grad = widen(grad), wide_weight = widen(weight);
  float total = 0.0f;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float product = wide_grad.at[j] * (wide_x.at[j] * rstd);
    sums.add(j, product);
    total += product * (offset + wide_weight.at[j]);
  }
  return total;
}

// What the threads of a group have added up goes to the block's row of `partials`. of_groups: [groups, width], free.
template <class T, int N, int KEPT>
__device__ void leave_sums(const RmsNormBackward& args, const Running<T, N> (&sums)[KEPT], float* of_groups) {
  if (args.partials == nullptr) return;
  const int vectors = static_cast<int>(args.width / N);
  float* partial = args.partials + blockIdx.x * args.width;
  if (blockDim.y > 1) __syncthreads();  // everyone has read the rows that were there
  float* to = blockDim.y == 1 ? partial : of_groups + threadIdx.y * args.width;
#pragma unroll
  for (int i = 0; i < KEPT; ++i) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at >= vectors) continue;
#pragma unroll
    for (int j = 0; j < N; j += 4) {
      const auto& sum = sums[i].sums.at;
      *reinterpret_cast<float4*>(to + at * N + j) = make_float4(sum[j], sum[j + 1], sum[j + 2], sum[j + 3]);
    }
  }
  if (blockDim.y > 1) sum_of_groups<T>(of_groups, args.width, partial);
}

// For rows of at most 32 vectors, of which each thread has one, and a weight of their type. The rows after those at
// work are on their way into registers meanwhile.
template <class T, bool MORE>
__global__ void __launch_bounds__(MORE ? AHEAD_SUM_THREADS : AHEAD_THREADS, 1)
    backward_ahead_kernel(const RmsNormBackward args, const Starts start, uint32_t rows) {
  constexpr int N = 16 / sizeof(T);
  extern __shared__ float of_groups[];  // [blockDim.y, width]
  const uint32_t width = static_cast<uint32_t>(args.width), step = gridDim.x * blockDim.y;
  const int threads = blockDim.x, column = threadIdx.x * N;
  const bool within = column < args.width;
  Vec<T, N> next_x, next_grad, next_more;
  float next_rstd = 0.0f;
  const auto ask = [&](uint32_t row) {
    if (row >= rows || !within) return;
    const int64_t at = int64_t{row} * width + column;
    next_rstd = args.rstd[row];
    next_x = load<N>(static_cast<const T*>(args.x) + start(row) + column);
    next_grad = load<N>(static_cast<const T*>(args.grad) + at);
    if constexpr (MORE) next_more = load<N>(static_cast<const T*>(args.grad_sum) + at);
  };
  uint32_t row = blockIdx.x * blockDim.y + threadIdx.y;
  ask(row);
  Running<T, N> sums[1];
  Vec<float, N> factor = {};
  if (within) factor = factor_of(load<N>(static_cast<const T*>(args.weight) + column), args.offset);
  const float inverse = 1.0f / static_cast<float>(args.width);
  for (uint32_t first = blockIdx.x * blockDim.y; first < rows; first += step, row += step) {
    const bool here = row < rows && within;
    const float rstd = next_rstd;
    Vec<float, N> h = {}, g = {};  // x * rstd and grad * factor
    [[maybe_unused]] const Vec<T, N> more = next_more;
    float total = 0.0f;
    if (here) {
      h = widen(next_x), g = widen(next_grad);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        h.at[j] *= rstd;
        sums[0].add(j, g.at[j] * h.at[j]);
        g.at[j] *= factor.at[j];
        total += g.at[j] * h.at[j];
      }
    }
    ask(row + step);
    const float mean = sum_of_row<false>(total, min(threads, 32), nullptr) * inverse;
    if (!here) continue;
#pragma unroll
    for (int j = 0; j < N; ++j) g.at[j] = (g.at[j] - h.at[j] * mean) * rstd;
    if constexpr (MORE) {
      const auto wide = widen(more);
#pragma unroll
      for (int j = 0; j < N; ++j) g.at[j] += wide.at[j];
    }
    store_whole(static_cast<T*>(args.grad_x) + int64_t{row} * width + column, narrow<T>(g));
  }
  leave_sums(args, sums, of_groups);
}

// For rows of at most RING_THREADS * RING_KEPT vectors and a weight of their type. Nothing of a row stays in registers
// over the sum: it is read from shared memory again, and its place is filled when the next row has been summed.
template <class T, bool MORE>
__global__ void __launch_bounds__(RING_THREADS, 1)
    backward_ring_kernel(const RmsNormBackward args, const Starts start, uint32_t rows) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  let_next_begin();
  constexpr int N = 16 / sizeof(T), KEPT = RING_KEPT;
  constexpr int STAGES = MORE ? RING_SUM_STAGES : RING_STAGES, ARRAYS = MORE ? 3 : 2;
  extern __shared__ __align__(128) int4 rings[];  // [group, stage, array, width]; in the end float [group, width]
  __shared__ float shared[2][RING_GROUPS][32];
  __shared__ uint64_t barriers[RING_GROUPS][STAGES];
  const int vectors = static_cast<int>(args.width / N), threads = blockDim.x, lane = threadIdx.x, group = threadIdx.y;
  const uint32_t width = static_cast<uint32_t>(args.width), step = gridDim.x * blockDim.y;
  const auto slot = [&](int stage, int array) {
    return reinterpret_cast<T*>(rings) + ((group * STAGES + stage) * ARRAYS + array) * width;
  };
  const auto fill = [&](uint32_t row, int stage) {
    if (lane != 0 || row >= rows) return;
    uint64_t* barrier = &barriers[group][stage];
    const uint32_t bytes = static_cast<uint32_t>(width * sizeof(T));
    const int64_t begin = int64_t{row} * width;
    expect(barrier, ARRAYS * bytes);
    copy_in(slot(stage, 0), static_cast<const T*>(args.x) + start(row), bytes, barrier);
    copy_in(slot(stage, 1), static_cast<const T*>(args.grad) + begin, bytes, barrier);
    if constexpr (MORE) copy_in(slot(stage, 2), static_cast<const T*>(args.grad_sum) + begin, bytes, barrier);
  };
  uint32_t row = blockIdx.x * blockDim.y + group;
  if (lane == 0) {
    for (int stage = 0; stage < STAGES; ++stage) prepare(&barriers[group][stage], 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  wait_for_previous();
  for (int stage = 0; stage < STAGES - 1; ++stage) fill(row + stage * step, stage);
  Vec<T, N> weight[KEPT];
  Running<T, N> sums[KEPT];
#pragma unroll
  for (int i = 0; i < KEPT; ++i) {
    const int at = lane + i * threads;
    if (at < vectors) weight[i] = load<N>(static_cast<const T*>(args.weight) + at * N);
  }
  __syncthreads();  // the barriers are ready

  const float inverse = 1.0f / static_cast<float>(args.width);
  float next_rstd = row < rows ? args.rstd[row] : 0.0f;
  int stage = 0, turn = 0;
  uint32_t parity = 0;
  for (; row < rows; row += step) {
    const float rstd = next_rstd;
    next_rstd = row + step < rows ? args.rstd[row + step] : 0.0f;
    wait(&barriers[group][stage], parity);
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
      const int at = lane + i * threads;
      if (at >= vectors) continue;
      forget(weight[i]);
      total += add_row(load<N>(slot(stage, 0) + at * N), load<N>(slot(stage, 1) + at * N), weight[i], args.offset, rstd,
                       sums[i]);
    }
    const float mean = sum_of_row<true>(total, threads, shared[turn][group]) * inverse;
    // All of the group are done with the row before this one.
    __syncwarp();
    fill(row + (STAGES - 1) * step, stage == 0 ? STAGES - 1 : stage - 1);
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
      const int at = lane + i * threads;
      if (at >= vectors) continue;
      Vec<T, N> more;
      if constexpr (MORE) more = load<N>(slot(stage, 2) + at * N);
      forget(weight[i]);
      store_whole(static_cast<T*>(args.grad_x) + int64_t{row} * width + at * N,
                  input_grad<T, N, MORE>(load<N>(slot(stage, 1) + at * N), load<N>(slot(stage, 0) + at * N), more,
                                         factor_of(weight[i], args.offset), rstd, mean));
    }
    turn ^= 1;
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
  leave_sums(args, sums, reinterpret_cast<float*>(rings));
#endif
}

constexpr int COLUMNS = 32, SLICES = 32;

// Second stage: the sum over the rows of `partials`, for 32 columns in a block; 32 threads share a column.
template <class W>
__global__ void __launch_bounds__(COLUMNS * SLICES) columns_kernel(const float* partials, int64_t count, int64_t width,
                                                                   W* sums) {
  __shared__ float shared[SLICES][COLUMNS + 1];
  let_next_begin();
  wait_for_previous();
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * COLUMNS; first < width;
       first += static_cast<int64_t>(gridDim.x) * COLUMNS) {
    const int64_t column = first + threadIdx.x;
    Running<W, 1> total;
    if (column < width) {
#pragma unroll 8
      for (int64_t row = threadIdx.y; row < count; row += SLICES) total.add(0, partials[row * width + column]);
    }
    __syncthreads();
    shared[threadIdx.y][threadIdx.x] = total.sums.at[0];
    __syncthreads();
    if (threadIdx.y == 0 && column < width) {
      for (int slice = 1; slice < SLICES; ++slice) total.add(0, shared[slice][threadIdx.x]);
      sums[column] = from_float<W>(total.sums.at[0]);
    }
  }
}

enum class Way { plain, ahead, ring };

struct Shape {
  Way way;
  int elements;                // of a vector
  dim3 block;                  // threads of a row, rows of a block
  bool whole;                  // threads keep all of a row
  int64_t per_multiprocessor;  // blocks that are at work at the same time
};

// Whether the device runs code that was made for Hopper (what was made from PTX for sm_80 has no bulk copies) and has
// room for the rings; asked once for each device.
bool has_rings() {
  constexpr int known = 64, most_bytes = 160 * 1024;
  static std::atomic<int> answers[known];  // 1: no, 2: yes
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  const int before = device < known ? answers[device].load(std::memory_order_relaxed) : 0;
  if (before != 0) return before == 2;
  cudaFuncAttributes found;
  if (cudaFuncGetAttributes(&found, backward_ring_kernel<float, false>) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return false;
  const bool answer = found.ptxVersion >= 90 && bytes >= most_bytes;
  if (device < known) answers[device].store(answer ? 2 : 1, std::memory_order_relaxed);
  return answer;
}

Shape backward_shape(const RmsNormBackward& args) {
  const int step = args.type == Type::f32 ? 4 : 8;
  const bool vectors = args.width % step == 0 && in_steps(args.rows, step) &&
                       aligned({args.grad, args.x, args.grad_sum, args.weight, args.grad_x});
  const int elements = vectors ? step : 1;
  const int64_t count = args.width / elements;
  const bool same = vectors && args.weight_type == args.type && starts_of(collapsed(args.rows)).inner > 0;
  if (same && count <= 32) {
    const int threads = args.grad_sum != nullptr ? AHEAD_SUM_THREADS : AHEAD_THREADS;
    return {Way::ahead, elements, block_of(count, 1, 0, true, threads), true, 1};
  }
  if (same && count <= RING_THREADS * RING_KEPT && has_rings()) {
    const unsigned threads = static_cast<unsigned>((count + RING_KEPT * 32 - 1) / (RING_KEPT * 32) * 32);
    return {Way::ring, elements, dim3(threads, std::min<unsigned>(RING_GROUPS, RING_THREADS / threads)), true, 1};
  }
  const dim3 block = block_of(count, BACKWARD_KEPT, BACKWARD_THREADS);
  return {Way::plain, elements, block, count <= BACKWARD_THREADS * BACKWARD_KEPT,
          std::max<int64_t>(1, BACKWARD_THREADS / (block.x * block.y))};
}

int64_t blocks_of(const RmsNormBackward& args, const Shape& shape) {
  const int64_t groups = (count(args.rows) + shape.block.y - 1) / shape.block.y;
  return std::min<int64_t>(groups, multiprocessors() * shape.per_multiprocessor);
}

template <class T, bool MORE>
int launch_backward(const Shape& shape, const RmsNormBackward& args, int64_t rows, unsigned blocks, Stream stream) {
  constexpr int N = 16 / sizeof(T);
  const size_t sums = shape.block.y == 1 ? 0 : shape.block.y * args.width * sizeof(float);
  if (shape.way == Way::ring) {
    const auto kernel = backward_ring_kernel<T, MORE>;
    const size_t row = args.width * sizeof(T) * (MORE ? 3 : 2);
    const size_t bytes = std::max(shape.block.y * row * (MORE ? RING_SUM_STAGES : RING_STAGES), sums);
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    return launch_early(kernel, blocks, shape.block, bytes, stream, args, starts_of(args.rows),
                        static_cast<uint32_t>(rows));
  }
  if (shape.way == Way::ahead) {
    backward_ahead_kernel<T, MORE>
        <<<blocks, shape.block, sums, stream>>>(args, starts_of(args.rows), static_cast<uint32_t>(rows));
    return launched();
  }
  const auto run = [&](auto kernel) { kernel<<<blocks, shape.block, sums, stream>>>(args, rows); };
  if (shape.elements == 1) {
    run(backward_kernel<T, 1, BACKWARD_KEPT, MORE, false>);
  } else if (!MORE && shape.whole && args.weight_type == args.type) {
    run(backward_kernel<T, N, BACKWARD_KEPT, false, true>);  // with more to hold, there are no registers for it
  } else {
    run(backward_kernel<T, N, BACKWARD_KEPT, MORE, false>);
  }
  return launched();
}

}  // namespace

int64_t rms_norm_partials(const RmsNormBackward& args) {
  const Shape shape = backward_shape(args);
  return blocks_of(args, shape) * (args.type == Type::f32 && !shape.whole ? 2 : 1);
}

int rms_norm_backward(const RmsNormBackward& given, Stream stream) {
  RmsNormBackward args = given;
  const int64_t rows = count(args.rows);
  if (args.width == 0) return 0;
  const int64_t blocks = blocks_of(args, backward_shape(args));
  args.rows = collapsed(args.rows);
  if (rows > 0) {
    const Shape shape = backward_shape(args);
    const int error = with_type(args.type, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const auto launch = args.grad_sum != nullptr ? launch_backward<T, true> : launch_backward<T, false>;
      return launch(shape, args, rows, static_cast<unsigned>(blocks), stream);
    });
    if (error != 0) return error;
  }
  if (args.partials == nullptr) return 0;
  return with_type(args.weight_type, [&](auto* type) {
    using W = std::remove_pointer_t<decltype(type)>;
    return launch_early(columns_kernel<W>, grid(args.width, COLUMNS), dim3(COLUMNS, SLICES), 0, stream, args.partials,
                        blocks, args.width, static_cast<W*>(args.grad_weight));
  });
}

}  // namespace megatune::cuda
