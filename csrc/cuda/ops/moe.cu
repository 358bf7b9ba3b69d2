// Mixture of experts: rows of tokens to their experts and back. No atomics: every sum is made in one fixed order.

#include <type_traits>

#include "../common/launch.cuh"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "megatune/cuda_tokens.h"

namespace megatune::cuda {

namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;

// ---- rows: threadIdx.x columns, .y rows; blockIdx.y the next columns

constexpr int AT_ONCE = 4;  // loads of a thread that are under way together
constexpr int SPAN = 8;     // the same, of a row that is copied

struct Tiles {
  dim3 blocks, block;
};

Tiles tiles(int64_t rows, int64_t vectors, int64_t each) {
  unsigned columns = 1;
  while (columns < THREADS && columns < vectors) columns *= 2;
  // Narrower blocks where the last one across would be half empty.
  while (columns > 32 && vectors % columns != 0 && vectors % columns <= columns / 2) columns /= 2;
  const unsigned many = THREADS / columns;
  return {dim3(grid(rows, many * each), static_cast<unsigned>((vectors + columns - 1) / columns)), dim3(columns, many)};
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS) take_kernel(const TakeRows args) {
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (column >= args.width) return;
  const int64_t step = static_cast<int64_t>(blockDim.y) * AT_ONCE;
  for (int64_t first = blockIdx.x * step + threadIdx.y; first < args.rows; first += gridDim.x * step) {
    Vec<T, N> values[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int64_t row = first + static_cast<int64_t>(i) * blockDim.y;
      if (row >= args.rows) continue;
      const int64_t at = args.index[row];
      if (at >= 0 && at < args.x_rows) {
        values[i] = load<N>(static_cast<const T*>(args.x) + at * args.stride + column);
      } else {
#pragma unroll
        for (int j = 0; j < N; ++j) values[i].at[j] = from_float<T>(0.0f);
      }
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int64_t row = first + static_cast<int64_t>(i) * blockDim.y;
      if (row < args.rows) store(static_cast<T*>(args.y) + row * args.width + column, values[i]);
    }
  }
}

// Where a choice's row is; -1: nowhere.
__device__ inline int64_t place_of(const int64_t* place, int64_t token, int64_t choice, int64_t choices, int64_t rows) {
  const int64_t at = choice < choices ? place[token * choices + choice] : -1;
  return at < rows ? at : -1;
}

// A warp has a token's row, or SPAN words a lane of it and the next warp those behind: read once, and written for one
// choice after the other at a stretch, which memory takes faster than pieces of several rows by turns. Choices `first`
// to first + `many`, 32 at most. W: vectors of 16 bytes or single elements; as words, not as structures of elements, of
// which the compiler makes slower code.
template <class W>
__global__ void __launch_bounds__(THREADS)
    copy_kernel(const CopyRows args, int64_t stride, int64_t width, int64_t parts, int64_t first, int many) {
  const int lane = threadIdx.x % 32;
  const int64_t job = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32, token = job / parts;
  const int64_t column = job % parts * 32 * SPAN + lane;
  if (token >= args.tokens) return;
  // Of the choice of this lane's number.
  const int64_t mine = lane < many ? args.place[token * args.choices + first + lane] : -1;
  const W* from = static_cast<const W*>(args.x) + token * stride;
  W values[SPAN];
#pragma unroll
  for (int i = 0; i < SPAN; ++i)
    if (column + i * 32 < width) values[i] = from[column + i * 32];
#pragma unroll 8
  for (int choice = 0; choice < many; ++choice) {
    const int64_t at = __shfl_sync(0xffffffffu, mine, choice);
    if (at < 0 || at >= args.row_count) continue;
    W* to = static_cast<W*>(args.y) + at * width;
    // Written once and read by another kernel, if at all: the first to leave the cache.
#pragma unroll
    for (int i = 0; i < SPAN; ++i)
      if (column + i * 32 < width) __stcs(to + column + i * 32, values[i]);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS) sum_kernel(const SumChoices args) {
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (column >= args.width) return;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; token < args.tokens;
       token += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    Vec<float, N> sum;
#pragma unroll
    for (int j = 0; j < N; ++j) sum.at[j] = 0.0f;
    for (int64_t first = 0; first < args.choices; first += AT_ONCE) {
      int64_t at[AT_ONCE];
      float weights[AT_ONCE];
      Vec<T, N> values[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        at[i] = place_of(args.place, token, first + i, args.choices, args.row_count);
        weights[i] = 1.0f;
        if (args.weights != nullptr && at[i] >= 0) weights[i] = args.weights[token * args.choices + first + i];
      }
      // Another row where there is none: without a condition all loads are under way together.
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i)
        values[i] = load<N>(static_cast<const T*>(args.rows) + max(at[i], int64_t{0}) * args.stride + column);
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        if (at[i] < 0) continue;
        const auto wide = widen(values[i]);
#pragma unroll
        for (int j = 0; j < N; ++j) sum.at[j] += wide.at[j] * weights[i];
      }
    }
    store_whole(static_cast<T*>(args.y) + token * args.width + column, narrow<T>(sum));
  }
}

// A block for each token.
template <class T, int N>
__global__ void __launch_bounds__(THREADS, 4) combine_backward_kernel(const CombineBackward args) {
  __shared__ float shared[WARPS][AT_ONCE];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t token = blockIdx.x; token < args.tokens; token += gridDim.x) {
    for (int64_t first = 0; first < args.choices; first += AT_ONCE) {
      int64_t at[AT_ONCE];
      float weights[AT_ONCE], products[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        at[i] = place_of(args.place, token, first + i, args.choices, args.row_count);
        weights[i] = at[i] >= 0 ? args.weights[token * args.choices + first + i] : 0.0f;
        products[i] = 0.0f;
      }
      for (int64_t column = static_cast<int64_t>(threadIdx.x) * N; column < args.width; column += THREADS * N) {
        const auto grad = widen(load<N>(static_cast<const T*>(args.grad) + token * args.grad_stride + column));
        if (args.rows != nullptr) {
          Vec<T, N> rows[AT_ONCE];
#pragma unroll
          for (int i = 0; i < AT_ONCE; ++i)
            if (at[i] >= 0) rows[i] = load<N>(static_cast<const T*>(args.rows) + at[i] * args.row_stride + column);
#pragma unroll
          for (int i = 0; i < AT_ONCE; ++i) {
            if (at[i] < 0) continue;
            const auto wide = widen(rows[i]);
#pragma unroll
            for (int j = 0; j < N; ++j) products[i] += grad.at[j] * wide.at[j];
          }
        }
        if (args.grad_rows == nullptr) continue;
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
          if (at[i] < 0) continue;
          Vec<float, N> scaled;
#pragma unroll
          for (int j = 0; j < N; ++j) scaled.at[j] = grad.at[j] * weights[i];
          store_whole(static_cast<T*>(args.grad_rows) + at[i] * args.width + column, narrow<T>(scaled));
        }
      }
      if (args.grad_weights == nullptr) continue;  // the same for all threads
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const float product = row_sum(products[i], 32, nullptr);
        if (lane == i) shared[warp][i] = product;
      }
      __syncthreads();
      if (threadIdx.x < AT_ONCE && first + threadIdx.x < args.choices) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) sum += shared[i][threadIdx.x];
        args.grad_weights[token * args.choices + first + threadIdx.x] = sum;
      }
      __syncthreads();
    }
  }
}

}  // namespace

int take_rows(const TakeRows& args, Stream stream) {
  if (args.rows == 0 || args.width == 0) return 0;
  with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    const bool vectors = args.width % N == 0 && args.stride % N == 0 && aligned({args.x, args.y});
    const Tiles shape = tiles(args.rows, args.width / (vectors ? N : 1), AT_ONCE);
    if (vectors) {
      take_kernel<T, N><<<shape.blocks, shape.block, 0, stream>>>(args);
    } else {
      take_kernel<T, 1><<<shape.blocks, shape.block, 0, stream>>>(args);
    }
  });
  return launched();
}

int sum_choices(const SumChoices& args, Stream stream) {
  if (args.tokens == 0 || args.width == 0) return 0;
  if (args.row_count == 0) {
    const size_t bytes = args.tokens * args.width * (args.type == Type::f32 ? 4 : 2);
    return static_cast<int>(cudaMemsetAsync(args.y, 0, bytes, stream));
  }
  with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    const bool vectors = args.width % N == 0 && args.stride % N == 0 && aligned({args.rows, args.y});
    const Tiles shape = tiles(args.tokens, args.width / (vectors ? N : 1), 1);
    if (vectors) {
      sum_kernel<T, N><<<shape.blocks, shape.block, 0, stream>>>(args);
    } else {
      sum_kernel<T, 1><<<shape.blocks, shape.block, 0, stream>>>(args);
    }
  });
  return launched();
}

int copy_rows(const CopyRows& args, Stream stream) {
  if (args.tokens == 0 || args.width == 0 || args.row_count == 0) return 0;
  const int64_t size = args.type == Type::f32 ? 4 : 2, each = 16 / size;
  const auto copy = [&](auto word, int64_t in_word) {
    const int64_t stride = args.stride / in_word, width = args.width / in_word;
    const int64_t parts = (width + 32 * SPAN - 1) / (32 * SPAN);
    const unsigned blocks = grid(args.tokens * parts, WARPS);
    for (int64_t first = 0; first < args.choices; first += 32) {
      const int many = static_cast<int>(std::min<int64_t>(32, args.choices - first));
      copy_kernel<decltype(word)><<<blocks, THREADS, 0, stream>>>(args, stride, width, parts, first, many);
    }
  };
  if (args.width % each == 0 && args.stride % each == 0 && aligned({args.x, args.y})) {
    copy(int4{}, each);
  } else if (size == 4) {
    copy(uint32_t{}, 1);
  } else {
    copy(uint16_t{}, 1);
  }
  return launched();
}

int combine_backward(const CombineBackward& args, Stream stream) {
  if (args.tokens == 0) return 0;
  with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    const bool vectors = args.width % N == 0 && args.grad_stride % N == 0 && args.row_stride % N == 0 &&
                         aligned({args.grad, args.rows, args.grad_rows});
    if (vectors) {
      combine_backward_kernel<T, N><<<grid(args.tokens, 1), THREADS, 0, stream>>>(args);
    } else {
      combine_backward_kernel<T, 1><<<grid(args.tokens, 1), THREADS, 0, stream>>>(args);
    }
  });
  return launched();
}

}  // namespace megatune::cuda
