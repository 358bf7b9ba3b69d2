// Quantised weights made dense: nf4 with scales that are quantised themselves, and int8 with a scale for each row.
//
// All that is read is a quarter (nf4) or a half (int8) of what is written, so the stores decide: each store of a warp
// is 512 bytes on end, and a thread has all its loads under way before the first of them.

#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "megatune/cuda_quant.h"

namespace megatune::cuda {

namespace {

constexpr int THREADS = 256, LANES = 32, WARPS = THREADS / LANES;
constexpr int TILE = 512;                 // numbers of which a warp takes care
constexpr int SCALES = TILE / NF4_BLOCK;  // theirs
static_assert(LANES % SCALES == 0 && NF4_NESTED % SCALES == 0);

__device__ const float NF4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// The codes of N numbers, in the order of the bytes.
template <int N>
struct Codes;
template <>
struct Codes<8> { using Word = uint32_t; };
template <>
struct Codes<4> { using Word = uint16_t; };

// Where `bytes` end, or words cannot be loaded: byte by byte; zeros beyond.
template <int N>
__device__ uint32_t some_codes(const uint8_t* packed, int64_t first, int64_t bytes) {
  uint32_t word = 0;
  for (int i = 0; i < N / 2; ++i)
    if (first + i < bytes) word |= static_cast<uint32_t>(packed[first + i]) << 8 * i;
  return word;
}

// N numbers a lane at a time, from the tile `begin` on. WHOLE: no tile ends early, and words can be loaded. What is
// read and written here is too much to stay in the cache: it is marked as the first to leave.
template <class T, int N, bool WHOLE>
__global__ void __launch_bounds__(THREADS) nf4_kernel(const Nf4Dense args, const int64_t begin, const int64_t end) {
  using Word = typename Codes<N>::Word;
  constexpr int TIMES = TILE / (LANES * N);
  const int lane = threadIdx.x % LANES;
  const int64_t tile = begin + static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / LANES;
  if (tile >= end) return;  // whole warps: all lanes of one take part in every shuffle
  const int64_t first = tile * TILE + lane * N;
  uint32_t codes[TIMES];
#pragma unroll
  for (int i = 0; i < TIMES; ++i) {
    if (WHOLE) {
      codes[i] = __ldcs(reinterpret_cast<const Word*>(args.packed + first / 2) + i * LANES);
    } else {
      codes[i] = some_codes<N>(args.packed, (first + i * LANES * N) / 2, (args.size + 1) / 2);
    }
  }
  const float table = NF4[lane % 16];
  const int64_t block = tile * SCALES + lane % SCALES;
  float mine = 0.0f;
  // Rounded after each step, as in megatune/ops/quant.py: no fused multiply and add.
  if (WHOLE || block * NF4_BLOCK < args.size)
    mine = __fadd_rn(__fmul_rn(args.code[args.scales[block]], args.nested[block / NF4_NESTED]), *args.offset);
  T* to = static_cast<T*>(args.dense) + first;
#pragma unroll
  for (int i = 0; i < TIMES; ++i) {
    const float scale = __shfl_sync(0xffffffffu, mine, (i * LANES + lane) / static_cast<int>(NF4_BLOCK / N));
    Vec<float, N> numbers;
#pragma unroll
    for (int j = 0; j < N; ++j)  // the shuffle takes the lowest four bits only
      numbers.at[j] = __fmul_rn(__shfl_sync(0xffffffffu, table, codes[i] >> 4 * (j ^ 1), 16), scale);
    const auto y = narrow<T>(numbers);
    if (WHOLE) {
      __stcs(reinterpret_cast<uint4*>(to + i * LANES * N), *reinterpret_cast<const uint4*>(&y));
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j)
        if (first + i * LANES * N + j < args.size) to[i * LANES * N + j] = y.at[j];
    }
  }
}

template <class T, int N, bool WHOLE>
void launch_nf4(const Nf4Dense& args, int64_t begin, int64_t end, Stream stream) {
  if (begin == end) return;
  nf4_kernel<T, N, WHOLE><<<grid(end - begin, WARPS), THREADS, 0, stream>>>(args, begin, end);
}

constexpr int INT8_TIMES = 2;      // vectors of a thread
constexpr int64_t MOST_Y = 65535;  // blocks in a grid's second and third direction

// INT8_TIMES vectors of N numbers of a row.
template <class T, int N>
__global__ void __launch_bounds__(THREADS) int8_kernel(const Int8Dense args) {
  const int64_t row = blockIdx.y + blockIdx.z * MOST_Y;
  if (row >= args.rows) return;
  const float scale = args.scales[row];
  const int8_t* from = args.numbers + row * args.columns;
  T* to = static_cast<T*>(args.dense) + row * args.columns;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * THREADS * INT8_TIMES + threadIdx.x) * N;
  Vec<int8_t, N> numbers[INT8_TIMES];
#pragma unroll
  for (int i = 0; i < INT8_TIMES; ++i)
    if (column + i * THREADS * N < args.columns) numbers[i] = load<N>(from + column + i * THREADS * N);
#pragma unroll
  for (int i = 0; i < INT8_TIMES; ++i) {
    if (column + i * THREADS * N >= args.columns) break;
    Vec<float, N> wide;
#pragma unroll
    for (int j = 0; j < N; ++j)
      wide.at[j] = __fmul_rn(__fmul_rn(static_cast<float>(numbers[i].at[j]), scale), args.step);
    store_whole(to + column + i * THREADS * N, narrow<T>(wide));
  }
}

template <class T, int N>
void launch_int8(const Int8Dense& args, Stream stream) {
  const dim3 blocks(grid(args.columns, static_cast<int64_t>(THREADS) * N * INT8_TIMES),
                    static_cast<unsigned>(std::min(args.rows, MOST_Y)),
                    static_cast<unsigned>((args.rows + MOST_Y - 1) / MOST_Y));
  int8_kernel<T, N><<<blocks, THREADS, 0, stream>>>(args);
}

}  // namespace

int nf4_dense(const Nf4Dense& args, Stream stream) {
  if (args.size == 0) return 0;
  with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    const int64_t tiles = (args.size + TILE - 1) / TILE;
    const int64_t whole = aligned({args.packed}, N / 2) ? args.size / TILE : 0;
    launch_nf4<T, N, true>(args, 0, whole, stream);
    launch_nf4<T, N, false>(args, whole, tiles, stream);
  });
  return launched();
}

int int8_dense(const Int8Dense& args, Stream stream) {
  if (args.rows == 0 || args.columns == 0) return 0;
  with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    if (args.columns % N == 0 && aligned({args.numbers}, N) && aligned({args.dense})) {
      launch_int8<T, N>(args, stream);
    } else {
      launch_int8<T, 1>(args, stream);
    }
  });
  return launched();
}

}  // namespace megatune::cuda
