// Gated linear unit on interleaved (gate, up) pairs, forward and backward; the activation is computed again in backward.

#include "../common/activate.cuh"
#include "../common/launch.cuh"
#include "../common/vec.cuh"

namespace megatune::cuda {

namespace {

constexpr int THREADS = 256;

// N pairs a thread at a time: two loads, one store.
template <class T, int N>
__global__ void __launch_bounds__(THREADS) glu_kernel(const Glu args) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * THREADS * N;
  for (int64_t row = blockIdx.y; row < args.rows; row += gridDim.y) {
    const T* from = static_cast<const T*>(args.gate_up) + row * args.row_stride;
    T* to = static_cast<T*>(args.y) + row * args.width;
    for (int64_t column = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * N; column < args.width;
         column += step) {
      const Vec<T, N> part[2] = {load<N>(from + 2 * column), load<N>(from + 2 * column + N)};
      Vec<T, N> y;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        // Pair i of both vectors put together; constant indices, so all of it stays in registers.
        const float gate = to_float(part[2 * i / N].at[2 * i % N]);
        const float up = to_float(part[(2 * i + 1) / N].at[(2 * i + 1) % N]);
        y.at[i] = from_float<T>(activate<false>(gate, args.activation).x * up);
      }
      store(to + column, y);
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
      store(to + 2 * column, result[0]);
      store(to + 2 * column + N, result[1]);
    }
  }
}

template <class T>
bool in_vectors(int64_t rows, int64_t row_stride, int64_t width, std::initializer_list<const void*> pointers) {
  constexpr int step = 16 / sizeof(T);
  return width % step == 0 && (rows == 1 || row_stride % step == 0) && aligned(pointers);
}

dim3 grid_of(int64_t rows, int64_t width, int elements) {
  // A block for every 256 vectors of a row; more rows than the grid takes are looped over.
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
    if (in_vectors<T>(args.rows, args.row_stride, args.width, {args.gate_up, args.y})) {
      constexpr int N = 16 / sizeof(T);
      glu_kernel<T, N><<<grid_of(args.rows, args.width, N), THREADS, 0, stream>>>(args);
    } else {
      glu_kernel<T, 1><<<grid_of(args.rows, args.width, 1), THREADS, 0, stream>>>(args);
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
