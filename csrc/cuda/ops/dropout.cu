// Dropout with a mask that is computed and not stored: see megatune/ops/dropout.py. The same bits as the reference.

#include <type_traits>

#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "megatune/cuda_dropout.h"

namespace megatune::cuda {

namespace {

constexpr int THREADS = 256;
constexpr int AT_ONCE = 4;        // rows whose loads are under way together
constexpr int ROWS = 2 * AT_ONCE;  // that a warp has: the hashes of its columns serve for all of them
constexpr uint32_t BITS = 0x7fffffffu;
constexpr uint32_t FIRST = 0x7FEB352Du, SECOND = 0x046CA68Bu, COLUMNS = 0x3C6EF372u;

// The rest of `_mix`, after its first xor.
__device__ inline uint32_t mixed(uint32_t x) {
  x = (x * FIRST) & BITS;
  x = ((x ^ (x >> 15)) * SECOND) & BITS;
  return x ^ (x >> 16);
}

__device__ inline uint32_t mix(uint32_t x) { return mixed(x ^ (x >> 16)); }

// An element's hash is mix(row ^ column). The first xor of `mix` is made of both alone, as (a ^ b) >> 16 is
// (a >> 16) ^ (b >> 16), and the 31 bits stand at the top of a word, where a product needs no mask.
__device__ inline uint32_t prepared(uint32_t hash) { return (hash ^ (hash >> 16)) << 1; }

struct Limit {
  uint32_t flip, least;

  __device__ explicit Limit(uint32_t threshold)
      : flip(threshold >> 16 << 1), least(threshold == 0 ? 0 : 2 * threshold - 1) {}

  // Whether mix(row ^ column) >= threshold. The last xor of `mix`, of its low half with its high one h, decides only
  // where h is the threshold's: that one does as well.
  __device__ bool kept(uint32_t row, uint32_t column) const {
    uint32_t x = (row ^ column) * FIRST;
    x = (x ^ (x >> 15 & ~1u)) * SECOND;
    return (x ^ flip) >= least;
  }
};

// blockDim.x threads across the columns, whole warps; each warp has ROWS rows of them.
template <class T, int N>
__global__ void __launch_bounds__(THREADS) dropout_kernel(const KeyedDropout args) {
  const int lane = threadIdx.x % 32;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y) * ROWS;
  const T* x = static_cast<const T*>(args.x) + column;
  T* y = static_cast<T*>(args.y) + column;
  const auto here = [&](int64_t row) { return column < args.width && row < args.rows; };
  const Limit limit(args.threshold);
  uint32_t mine = 0, columns[N];  // hashes: of the row of this lane's number, of this thread's columns
#pragma unroll
  for (int begin = 0; begin < ROWS; begin += AT_ONCE) {
    Vec<T, N> values[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int64_t row = first + begin + i;
      if (here(row)) values[i] = load<N>(x + row * args.stride);
    }
    if (begin == 0) {  // while the loads are under way
      const int64_t row = first + lane;
      if (lane < ROWS && row < args.rows) {
        const int64_t name = args.names == nullptr ? row : args.names[row];
        mine = prepared(mix(mix((static_cast<uint32_t>(name) & BITS) ^ args.low) ^ args.high));
      }
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int64_t name = (args.first_column + column + j) ^ COLUMNS;
        columns[j] = prepared(mixed(static_cast<uint32_t>(name ^ (name >> 16))));
      }
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const uint32_t hash = __shfl_sync(0xffffffffu, mine, begin + i);
      auto wide = widen(values[i]);
#pragma unroll
      for (int j = 0; j < N; ++j) wide.at[j] = limit.kept(hash, columns[j]) ? wide.at[j] * args.scale : 0.0f;
      const int64_t row = first + begin + i;
      if (here(row)) store_whole(y + row * args.width, narrow<T>(wide));
    }
  }
}

template <class T, int N>
void launch(const KeyedDropout& args, Stream stream) {
  const int64_t vectors = (args.width + N - 1) / N;
  unsigned across = THREADS;
  // Narrower where the last block across would be half empty.
  while (across > 32 && vectors % across != 0 && vectors % across <= across / 2) across /= 2;
  const dim3 block(across, THREADS / across);
  const dim3 blocks(grid(args.rows, block.y * ROWS), static_cast<unsigned>((vectors + across - 1) / across));
  dropout_kernel<T, N><<<blocks, block, 0, stream>>>(args);
}

}  // namespace

int keyed_dropout(const KeyedDropout& args, Stream stream) {
  if (args.rows == 0 || args.width == 0) return 0;
  with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    const bool vectors = args.width % N == 0 && args.stride % N == 0 && aligned({args.x, args.y});
    if (vectors) {
      launch<T, N>(args, stream);
    } else {
      launch<T, 1>(args, stream);
    }
  });
  return launched();
}

}  // namespace megatune::cuda
