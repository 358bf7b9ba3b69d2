// Rotary position embedding: the pairs (x[i], x[i + half]) of every head turned by the angle of its token.

#include "../common/launch.cuh"
#include "../common/vec.cuh"

namespace megatune::cuda {

namespace {

constexpr int THREADS = 256;

// threadIdx.x: columns, .y: heads, .z: tokens. The angles of a thread's columns are loaded once for all of its heads.
template <class T, int N>
__global__ void __launch_bounds__(THREADS) rope_kernel(const Rope args) {
  const int64_t inner = args.rows.size[1] * args.rows.size[2];
  const float sign = args.inverse ? -1.0f : 1.0f;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z; token < args.rows.size[0];
       token += static_cast<int64_t>(gridDim.x) * blockDim.z) {
    for (int64_t column = static_cast<int64_t>(threadIdx.x) * N; column < args.half; column += blockDim.x * N) {
      const auto cos = load_any<N>(args.cos, Type::f32, token * args.half + column);
      const auto sin = load_any<N>(args.sin, Type::f32, token * args.half + column);
      for (int64_t head = threadIdx.y; head < inner; head += blockDim.y) {
        const T* from = static_cast<const T*>(args.x) + offset_of(args.rows, token * inner + head) + column;
        T* to = static_cast<T*>(args.y) + (token * inner + head) * args.width + column;
        const auto first = load<N>(from), second = load<N>(from + args.half);
        Vec<T, N> low, high;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float one = to_float(first.at[i]), two = to_float(second.at[i]), turn = sign * sin.at[i];
          low.at[i] = from_float<T>(one * cos.at[i] - two * turn);
          high.at[i] = from_float<T>(two * cos.at[i] + one * turn);
        }
        store(to, low);
        store(to + args.half, high);
      }
    }
    // What is beyond the rotated dimensions passes through.
    for (int64_t column = 2 * args.half + static_cast<int64_t>(threadIdx.x) * N; column < args.width;
         column += blockDim.x * N) {
      for (int64_t head = threadIdx.y; head < inner; head += blockDim.y) {
        const T* from = static_cast<const T*>(args.x) + offset_of(args.rows, token * inner + head) + column;
        store(static_cast<T*>(args.y) + (token * inner + head) * args.width + column, load<N>(from));
      }
    }
  }
}

unsigned power_of_two(int64_t value, unsigned most) {
  unsigned result = 1;
  while (result < most && result < value) result *= 2;
  return result;
}

}  // namespace

int rope(const Rope& args, Stream stream) {
  const int64_t tokens = args.rows.size[0], heads = args.rows.size[1] * args.rows.size[2];
  if (tokens == 0 || heads == 0 || args.width == 0) return 0;
  with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    const bool vectors = args.half % N == 0 && args.width % N == 0 && in_steps(args.rows, N) &&
                         aligned({args.x, args.cos, args.sin, args.y});
    const unsigned columns = power_of_two(std::max<int64_t>(1, args.half) / (vectors ? N : 1), 32);
    const unsigned rows = power_of_two(heads, THREADS / columns);
    const dim3 block(columns, rows, std::min(THREADS / (columns * rows), 64u));
    if (vectors) {
      rope_kernel<T, N><<<grid(tokens, block.z), block, 0, stream>>>(args);
    } else {
      rope_kernel<T, 1><<<grid(tokens, block.z), block, 0, stream>>>(args);
    }
  });
  return launched();
}

}  // namespace megatune::cuda
