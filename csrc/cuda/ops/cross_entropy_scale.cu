// What backward does with a gradient that forward has made: multiplies it by a number that is on the device.

#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "megatune/cuda_loss.h"

namespace megatune::cuda {

namespace {

constexpr int THREADS = 512;

// A row of blocks for each row of elements; N at a time, then one by one what is left at its end.
template <class From, class To, int N>
__global__ void __launch_bounds__(THREADS) scale_kernel(const Scale args) {
  const float factor = *args.factor;
  if (factor == 1.0f && args.x == args.out) return;  // a loss that nothing is done with
  const int64_t vectors = args.width / N, step = static_cast<int64_t>(gridDim.x) * THREADS;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  for (int64_t row = blockIdx.y; row < args.rows; row += gridDim.y) {
    const From* x = static_cast<const From*>(args.x) + row * args.x_stride;
    To* out = static_cast<To*>(args.out) + row * args.out_stride;
    for (int64_t at = first; at < vectors; at += step) {
      Vec<float, N> wide = widen(load<N>(x + at * N));
#pragma unroll
      for (int i = 0; i < N; ++i) wide.at[i] *= factor;
      store_whole(out + at * N, narrow<To>(wide));
    }
    const int64_t left = vectors * N + first;
    if (left < args.width) out[left] = from_float<To>(to_float(x[left]) * factor);
  }
}

template <class From, class To>
int launch(const Scale& args, Stream stream) {
  constexpr int N = 16 / sizeof(From);  // not wider than what is written: both have 16 bytes at most
  const bool whole = aligned({args.x, args.out}) &&
                     (args.rows == 1 || (args.x_stride % N == 0 && args.out_stride * sizeof(To) % 16 == 0));
  const dim3 blocks(static_cast<unsigned>(std::min<int64_t>(
                        std::max<int64_t>(1, args.width / (whole ? N : 1) / THREADS), multiprocessors() * 16)),
                    static_cast<unsigned>(std::min<int64_t>(args.rows, 65535)));
  if (whole) {
    scale_kernel<From, To, N><<<blocks, THREADS, 0, stream>>>(args);
  } else {
    scale_kernel<From, To, 1><<<blocks, THREADS, 0, stream>>>(args);
  }
  return launched();
}

}  // namespace

int scale(const Scale& args, Stream stream) {
  if (args.rows == 0 || args.width == 0) return 0;
  return with_type(args.from, [&](auto* from) {
    using From = std::remove_pointer_t<decltype(from)>;
    if (args.to == args.from) return launch<From, From>(args, stream);
    if constexpr (std::is_same_v<From, float>) {
      if (args.to == Type::bf16) return launch<float, __nv_bfloat16>(args, stream);
      return launch<float, __half>(args, stream);
    }
    return static_cast<int>(cudaErrorInvalidValue);
  });
}

}  // namespace megatune::cuda
