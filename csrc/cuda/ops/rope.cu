// Rotary position embedding: the pairs (x[i], x[i + half]) of every head turned by the angle of its token.

#include "../common/launch.cuh"
#include "../common/vec.cuh"

namespace megatune::cuda {

namespace {

constexpr int THREADS = 256;
constexpr int HEADS = 2;  // that a thread has on their way

// threadIdx.x: columns, .y: heads, .z: tokens. The angles of a thread's columns are loaded once for all of its heads,
// of which it reads HEADS before it writes any.
template <class T, int N, int HEADS>
__global__ void __launch_bounds__(THREADS) rope_kernel(const Rope args) {
  const int heads = static_cast<int>(args.rows.size[1] * args.rows.size[2]);
  const uint32_t inner = static_cast<uint32_t>(args.rows.size[2]);
  const float sign = args.inverse ? -1.0f : 1.0f;
  const auto head_of = [&](int64_t token, uint32_t head) {
    return static_cast<const T*>(args.x) + token * args.rows.stride[0] + head / inner * args.rows.stride[1] +
           head % inner * args.rows.stride[2];
  };
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z; token < args.rows.size[0];
       token += static_cast<int64_t>(gridDim.x) * blockDim.z) {
    T* y = static_cast<T*>(args.y) + token * heads * args.width;
    for (int64_t column = static_cast<int64_t>(threadIdx.x) * N; column < args.half; column += blockDim.x * N) {
      const auto cos = load_any<N>(args.cos, Type::f32, token * args.half + column);
      const auto sin = load_any<N>(args.sin, Type::f32, token * args.half + column);
      for (int begin = threadIdx.y; begin < heads; begin += blockDim.y * HEADS) {
        Vec<T, N> first[HEADS], second[HEADS];
#pragma unroll
        for (int i = 0; i < HEADS; ++i) {
          const int head = begin + i * blockDim.y;
          if (head >= heads) continue;
          const T* from = head_of(token, head) + column;
          first[i] = load<N>(from), second[i] = load<N>(from + args.half);
        }
#pragma unroll
        for (int i = 0; i < HEADS; ++i) {
          const int head = begin + i * blockDim.y;
          if (head >= heads) continue;
          const auto one = widen(first[i]), two = widen(second[i]);
          Vec<float, N> low, high;
#pragma unroll
          for (int j = 0; j < N; ++j) {
            low.at[j] = one.at[j] * cos.at[j] - two.at[j] * (sign * sin.at[j]);
            high.at[j] = two.at[j] * cos.at[j] + one.at[j] * (sign * sin.at[j]);
          }
          T* to = y + head * args.width + column;
          store_whole(to, narrow<T>(low));
          store_whole(to + args.half, narrow<T>(high));
        }
      }
    }
    // What is beyond the rotated dimensions passes through.
    for (int64_t column = 2 * args.half + static_cast<int64_t>(threadIdx.x) * N; column < args.width;
         column += blockDim.x * N) {
      for (int head = threadIdx.y; head < heads; head += blockDim.y)
        store_whole(y + head * args.width + column, load<N>(head_of(token, head) + column));
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
    const unsigned rows = power_of_two((heads + HEADS - 1) / HEADS, THREADS / columns);
    const dim3 block(columns, rows, std::min(THREADS / (columns * rows), 64u));
    if (vectors) {
      rope_kernel<T, N, HEADS><<<grid(tokens, block.z), block, 0, stream>>>(args);
    } else {
      rope_kernel<T, 1, HEADS><<<grid(tokens, block.z), block, 0, stream>>>(args);
    }
  });
  return launched();
}

}  // namespace megatune::cuda
