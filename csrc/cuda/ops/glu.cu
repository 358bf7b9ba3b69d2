// Gated linear unit on interleaved (gate, up) pairs, forward and backward, which computes the activation again.

#include "../common/activate.cuh"
#include "../common/launch.cuh"
#include "../common/vec.cuh"

namespace megatune::cuda {

namespace {

constexpr int THREADS = 256;
constexpr int LOADS = 4;  // of 16 bytes that a thread has on their way, forward

// N pairs (gate, up) one after the other. One pair may begin anywhere.
template <class T, int N>
__device__ Vec<T, 2 * N> load_pairs(const T* from) {
  if constexpr (N == 1) return {from[0], from[1]};
  else return load<2 * N>(from);
}

// Each thread takes LOADS times N pairs, THREADS * N pairs from each other, so that a warp reads without gaps.
template <class T, int N, int LOADS, bool FAST>
__global__ void __launch_bounds__(THREADS) glu_kernel(const Glu args) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * THREADS * N * LOADS + threadIdx.x * N;
  for (int64_t row = blockIdx.y; row < args.rows; row += gridDim.y) {
    const T* from = static_cast<const T*>(args.gate_up) + row * args.row_stride;
    T* to = static_cast<T*>(args.y) + row * args.width;
    for (int64_t begin = first; begin < args.width; begin += static_cast<int64_t>(gridDim.x) * THREADS * N * LOADS) {
      Vec<T, 2 * N> part[LOADS];
#pragma unroll
      for (int i = 0; i < LOADS; ++i) {
        const int64_t column = begin + i * THREADS * N;
        if (column < args.width) part[i] = load_pairs<T, N>(from + 2 * column);
      }
#pragma unroll
      for (int i = 0; i < LOADS; ++i) {
        const int64_t column = begin + i * THREADS * N;
        if (column >= args.width) break;
        const auto pairs = widen(part[i]);
        Vec<float, N> y;
#pragma unroll
        for (int j = 0; j < N; ++j)
          y.at[j] = activate<false, FAST>(pairs.at[2 * j], args.activation).x * pairs.at[2 * j + 1];
        store_whole(to + column, narrow<T>(y));
      }
    }
  }
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS) glu_backward_kernel(const GluBackward args) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * THREADS * N;
  for (int64_t row = blockIdx.y; row < args.rows; row += gridDim.y) {
    const T* from = static_cast<const T*>(args.gate_up) + row * args.row_stride;
    const T* grads = static_cast<const T*>(args.grad) + row * args.width;
    T* to = static_cast<T*>(args.grad_gate_up) + row * 2 * args.width;
    for (int64_t column = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * N; column < args.width;
         column += step) {
      const Vec<T, N> part[2] = {load<N>(from + 2 * column), load<N>(from + 2 * column + N)};
      const Vec<T, N> grad = load<N>(grads + column);
      Vec<T, N> result[2];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float gate = to_float(part[2 * i / N].at[2 * i % N]);
        const float up = to_float(part[(2 * i + 1) / N].at[(2 * i + 1) % N]);
        const float2 active = activate<true>(gate, args.activation);
        const float g = to_float(grad.at[i]);
        result[2 * i / N].at[2 * i % N] = from_float<T>(g * up * active.y);
        result[(2 * i + 1) / N].at[(2 * i + 1) % N] = from_float<T>(g * active.x);
      }
      store_whole(to + 2 * column, result[0]);
      store_whole(to + 2 * column + N, result[1]);
    }
  }
}

template <class T>
bool in_vectors(int64_t rows, int64_t row_stride, int64_t width, std::initializer_list<const void*> pointers) {
  constexpr int step = 16 / sizeof(T);
  return width % step == 0 && (rows == 1 || row_stride % step == 0) && aligned(pointers);
}

dim3 grid_of(int64_t rows, int64_t width, int elements) {
  // A block for what 256 threads take of a row at a time; more rows than the grid takes are looped over.
  return dim3(grid(width, static_cast<int64_t>(THREADS) * elements), static_cast<unsigned>(std::min<int64_t>(rows, 65535)));
}

// Rows one after the other are one long row.
template <class Args>
Args joined(Args args) {
  if (args.row_stride == 2 * args.width) args.width *= args.rows, args.row_stride = 0, args.rows = 1;
  return args;
}

}  // namespace

int glu(const Glu& given, Stream stream) {
  if (given.rows == 0 || given.width == 0) return 0;
  const Glu args = joined(given);
  with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr bool FAST = sizeof(T) == 2;
    if (in_vectors<T>(args.rows, args.row_stride, args.width, {args.gate_up, args.y})) {
      constexpr int N = 8 / sizeof(T);
      glu_kernel<T, N, LOADS, FAST><<<grid_of(args.rows, args.width, N * LOADS), THREADS, 0, stream>>>(args);
    } else {
      glu_kernel<T, 1, LOADS, FAST><<<grid_of(args.rows, args.width, LOADS), THREADS, 0, stream>>>(args);
    }
  });
  return launched();
}

int glu_backward(const GluBackward& given, Stream stream) {
  if (given.rows == 0 || given.width == 0) return 0;
  const GluBackward args = joined(given);
  with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (in_vectors<T>(args.rows, args.row_stride, args.width, {args.gate_up, args.grad, args.grad_gate_up})) {
      constexpr int N = 16 / sizeof(T);
      glu_backward_kernel<T, N><<<grid_of(args.rows, args.width, N), THREADS, 0, stream>>>(args);
    } else {
      glu_backward_kernel<T, 1><<<grid_of(args.rows, args.width, 1), THREADS, 0, stream>>>(args);
    }
  });
  return launched();
}

}  // namespace megatune::cuda
