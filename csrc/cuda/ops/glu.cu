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

constexpr float LIMIT = 7.0f, SHARPNESS = 1.702f;  // of the clamped gate

// What the product takes of a gate, and its derivative. The comparisons let NaN pass.
template <Activation A, bool SLOPE, bool FAST>
__device__ float2 of_gate(float gate) {
  if constexpr (A != Activation::clamped) return activate<SLOPE, FAST>(gate, A);
  const float held = gate > LIMIT ? LIMIT : gate;
  const float sigmoid = sigmoid_of<FAST>(SHARPNESS * held);
  const float value = held * sigmoid;
  return {value, SLOPE && !(gate > LIMIT) ? sigmoid + value * (1.0f - sigmoid) * SHARPNESS : 0.0f};
}

// What it takes of an up.
template <Activation A>
__device__ float of_up(float up) {
  if constexpr (A != Activation::clamped) return up;
  return (up > LIMIT ? LIMIT : up < -LIMIT ? -LIMIT : up) + 1.0f;
}

template <Activation A>
__device__ bool up_passes(float up) {
  return A != Activation::clamped || fabsf(up) <= LIMIT;
}

// Each thread takes LOADS times N pairs, THREADS * N pairs from each other, so that a warp reads without gaps.
template <class T, int N, int LOADS, Activation A>
__global__ void __launch_bounds__(THREADS) glu_kernel(const Glu args) {
  constexpr bool FAST = sizeof(T) == 2;
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
          y.at[j] = of_gate<A, false, FAST>(pairs.at[2 * j]).x * of_up<A>(pairs.at[2 * j + 1]);
        store_whole(to + column, narrow<T>(y));
      }
    }
  }
}

// The activation is chosen for each value, but for the clamped one: with silu or gelu_tanh known to the compiler
// and the fast sigmoid, it takes a quarter longer on an H200.
template <class T, int N, bool CLAMPED>
__global__ void __launch_bounds__(THREADS) glu_backward_kernel(const GluBackward args) {
  constexpr Activation A = CLAMPED ? Activation::clamped : Activation::silu;  // silu: any other
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
        float2 active;
        if constexpr (CLAMPED) active = of_gate<A, true, sizeof(T) == 2>(gate);
        else active = activate<true>(gate, args.activation);
        const float g = to_float(grad.at[i]);
        result[2 * i / N].at[2 * i % N] = from_float<T>(g * of_up<A>(up) * active.y);
        result[(2 * i + 1) / N].at[(2 * i + 1) % N] = from_float<T>(up_passes<A>(up) ? g * active.x : 0.0f);
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

// Calls body with the type and the activation, both known to the compiler.
template <class Body>
void with_kind(Type type, Activation activation, Body&& body) {
  with_type(type, [&](auto* null) {
    const auto go = [&](auto known) { body(null, known); };
    switch (activation) {
      case Activation::silu: return go(std::integral_constant<Activation, Activation::silu>{});
      case Activation::gelu: return go(std::integral_constant<Activation, Activation::gelu>{});
      case Activation::gelu_tanh: return go(std::integral_constant<Activation, Activation::gelu_tanh>{});
      case Activation::clamped: return go(std::integral_constant<Activation, Activation::clamped>{});
    }
  });
}

}  // namespace

int glu(const Glu& given, Stream stream) {
  if (given.rows == 0 || given.width == 0) return 0;
  const Glu args = joined(given);
  with_kind(args.type, args.activation, [&](auto* type, auto activation) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr Activation A = decltype(activation)::value;
    if (in_vectors<T>(args.rows, args.row_stride, args.width, {args.gate_up, args.y})) {
      constexpr int N = 8 / sizeof(T);
      glu_kernel<T, N, LOADS, A><<<grid_of(args.rows, args.width, N * LOADS), THREADS, 0, stream>>>(args);
    } else {
      glu_kernel<T, 1, LOADS, A><<<grid_of(args.rows, args.width, LOADS), THREADS, 0, stream>>>(args);
    }
  });
  return launched();
}

int glu_backward(const GluBackward& given, Stream stream) {
  if (given.rows == 0 || given.width == 0) return 0;
  const GluBackward args = joined(given);
  with_kind(args.type, args.activation, [&](auto* type, auto activation) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr bool CLAMPED = decltype(activation)::value == Activation::clamped;
    if (in_vectors<T>(args.rows, args.row_stride, args.width, {args.gate_up, args.grad, args.grad_gate_up})) {
      constexpr int N = 16 / sizeof(T);
      glu_backward_kernel<T, N, CLAMPED><<<grid_of(args.rows, args.width, N), THREADS, 0, stream>>>(args);
    } else {
      glu_backward_kernel<T, 1, CLAMPED><<<grid_of(args.rows, args.width, 1), THREADS, 0, stream>>>(args);
    }
  });
  return launched();
}

}  // namespace megatune::cuda
