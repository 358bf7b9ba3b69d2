// Root-mean-square norm, forward, with the residual's addition in the same pass if asked for.
//
// A row is shared by some lanes of a warp (short rows, several in a block) or by a whole block. Each thread keeps some
// vectors of its row in registers; of rows longer than that the rest is read a second time, from the cache. All that a
// thread reads is asked for before anything is written: the compiler moves no load before a store.

#include "../common/launch.cuh"
#include "rms_norm.cuh"

namespace megatune::cuda {

namespace {

constexpr int FORWARD_THREADS = 1024;
constexpr int FORWARD_KEPT = 4, FORWARD_SUM_KEPT = 2;  // without and with a residual

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

// SUM: there is a residual. FAR: rows may be longer than what the threads keep.
// HELD: the weight has the type of the rows and is asked for before the sum: one wait less between x and y.
template <class T, int N, int KEPT, bool SUM, bool FAR, bool HELD>
__global__ void __launch_bounds__(FORWARD_THREADS)
    forward_kernel(const RmsNorm args, const Starts start, int64_t rows) {
  __shared__ float shared[2][32];
  int turn = 0;
  const int vectors = static_cast<int>(args.width / N);
  const int threads = blockDim.x, lane = threadIdx.x;
  // All threads of a block go through the loop equally often: they add up together.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < rows;
       first += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t row = first + threadIdx.y;
    const bool here = row < rows;
    const int mine = here ? vectors : 0;
    const int64_t any = here ? row : 0;
    const int64_t begin = start.inner > 0 ? start(static_cast<uint32_t>(any)) : offset_of(args.rows, any);
    const T* x = static_cast<const T*>(args.x) + begin;
    T* y = static_cast<T*>(args.y) + row * args.width;
    const T* residual = nullptr;
    if constexpr (SUM) residual = static_cast<const T*>(args.residual) + offset_of(args.residual_rows, any);
    T* sum = static_cast<T*>(args.sum) + row * args.width;

    Vec<T, N> cached[KEPT], held[HELD ? KEPT : 1];
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < KEPT; ++i)
      if (lane + i * threads < mine) cached[i] = load<N>(x + (lane + i * threads) * N);
    if constexpr (HELD) {
#pragma unroll
      for (int i = 0; i < KEPT; ++i)
        if (lane + i * threads < mine)
          held[i] = load<N>(static_cast<const T*>(args.weight) + (lane + i * threads) * N);
    }
    if constexpr (SUM) {
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
      if constexpr (SUM) {
        values = added(values, load<N>(residual + at * N));
        store_whole(sum + at * N, values);
      }
      total += squares(values);
    }
    total = sum_of_row<false>(total, threads, shared[turn]);
    turn ^= 1;
    if (!here) continue;
    const float rstd = rsqrtf(total / static_cast<float>(args.width) + args.eps);
    if (lane == 0) args.rstd[row] = rstd;
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
      const int column = (lane + i * threads) * N;
      if (lane + i * threads >= mine) continue;
      Vec<float, N> weight;
      if constexpr (HELD) {
        weight = widen(held[i]);
      } else {
        weight = load_any<N>(args.weight, args.weight_type, column);
      }
      store_whole(y + column, normalised(args, cached[i], rstd, weight));
    }
    // What this thread wrote to `sum` it may read again; nobody else's.
    const T* again = SUM ? sum : x;
    for (int at = lane + KEPT * threads; FAR && at < mine; at += threads) {
      const auto far = load_any<N>(args.weight, args.weight_type, at * N);
      store_whole(y + at * N, normalised(args, load<N>(again + at * N), rstd, far));
    }
  }
}

template <class T, bool SUM>
void launch_forward(const RmsNorm& args, int64_t rows, Stream stream) {
  constexpr int N = 16 / sizeof(T), KEPT = SUM ? FORWARD_SUM_KEPT : FORWARD_KEPT;
  const Starts start = starts_of(args.rows);
  const auto run = [&](auto kernel, dim3 block) {
    kernel<<<grid(rows, block.y), block, 0, stream>>>(args, start, rows);
  };
  const int64_t count = args.width / N;
  if (args.width % N != 0 || !in_steps(args.rows, N) || !in_steps(args.residual_rows, N) ||
      !aligned({args.x, args.residual, args.sum, args.weight, args.y})) {
    run(forward_kernel<T, 1, KEPT, SUM, true, false>, block_of(args.width, KEPT, FORWARD_THREADS));
  } else if (count > FORWARD_THREADS * KEPT) {
    run(forward_kernel<T, N, FORWARD_SUM_KEPT, SUM, true, false>, block_of(count, FORWARD_SUM_KEPT, FORWARD_THREADS));
  } else if (args.weight_type == args.type) {
    run(forward_kernel<T, N, KEPT, SUM, false, true>, block_of(count, KEPT, FORWARD_THREADS, true));
  } else {
    run(forward_kernel<T, N, KEPT, SUM, false, false>, block_of(count, KEPT, FORWARD_THREADS, true));
  }
}

}  // namespace

int rms_norm(const RmsNorm& given, Stream stream) {
  RmsNorm args = given;
  const int64_t rows = count(args.rows);
  if (rows == 0 || args.width == 0) return 0;
  args.rows = collapsed(args.rows);
  args.residual_rows = collapsed(args.residual_rows);
  with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (args.residual == nullptr) {
      launch_forward<T, false>(args, rows, stream);
    } else {
      launch_forward<T, true>(args, rows, stream);
    }
  });
  return launched();
}

}  // namespace megatune::cuda
