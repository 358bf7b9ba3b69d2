// Tiles of 128 x 128 values of 16 bits that are computed on the way, quantised in blocks: a thread block for each, 8 x 8
// values a thread, lane l of 16 the columns from 8 l on, group g of 16 the rows from 8 g on. All in words of two values.
//
// A source gives
//   BLOCKS                         that its registers leave room for on a multiprocessor
//   from(row, column)              where PIECES vectors of 16 bytes begin, of which eight values are made
//   rows(row, rows), columns(column)  what it needs of the rows and columns besides
//   finish(pieces, rows, i, columns, y)  the eight values of row i, as four words
#pragma once

// nvcc warns of a constant of a template that one of its instances does not need.
#pragma nv_diag_suppress 177

#include "fp8.cuh"

namespace megatune::cuda::fp8 {

template <class T>
__device__ inline typename PairOf<T>::Type narrow_two(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) return __floats2half2_rn(low, high);
  else return __floats2bfloat162_rn(low, high);
}

// Two neighbouring values as they stand in memory, a word of a 16 bit type T.
template <class T>
struct Pair {
  __device__ static float2 wide(uint32_t word) {
    if constexpr (std::is_same_v<T, __half>) {
      __half2 both;
      memcpy(&both, &word, sizeof both);
      return __half22float2(both);
    } else {
      return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
    }
  }
  __device__ static uint32_t narrow(float low, float high) {
    const auto both = fp8::narrow_two<T>(low, high);
    uint32_t word;
    memcpy(&word, &both, sizeof word);
    return word;
  }
  __device__ static uint32_t product(uint32_t left, uint32_t right) {
    typename PairOf<T>::Type a, b;
    memcpy(&a, &left, sizeof a), memcpy(&b, &right, sizeof b);
    a = __hmul2(a, b);
    memcpy(&left, &a, sizeof left);
    return left;
  }
  __device__ static uint32_t magnitudes(uint32_t word) { return word & 0x7fff7fffu; }
  // NaN is left out.
  __device__ static uint32_t larger(uint32_t left, uint32_t right) {
    typename PairOf<T>::Type a, b;
    memcpy(&a, &left, sizeof a), memcpy(&b, &right, sizeof b);
    a = __hmax2(a, b);
    memcpy(&left, &a, sizeof left);
    return left;
  }
};

// Eight rows of eight values.
struct Block {
  uint32_t at[N][N / 2];
};

// Padding is not what a source makes of zeros: a norm's weights below 0 give them a sign, infinite ones make them NaN.
__device__ inline void blank(Block& block, int64_t rows) {
  if (rows >= N) return;
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int j = 0; j < N / 2; ++j)
      if (i >= rows) block.at[i][j] = 0;
}

__device__ inline uint32_t shuffled(uint32_t word, int other) { return __shfl_xor_sync(0xffffffffu, word, other); }

// Shared memory of a tile.
struct TileMemory {
  uint2 turned[TILE * LANES];  // transposed codes: word w (eight rows) of column c at w ^ (c / 8)
  float inverses[TILE];        // of the columns' scales
  uint4 peaks[WARPS * LANES];  // of the columns in each warp
};

// The largest magnitudes of this thread's part of each row, and of its columns in this warp.
template <class T>
__device__ void peaks_of(const Block& block, uint32_t (&of_rows)[N], uint32_t (&of_columns)[N / 2]) {
  using P = Pair<T>;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    uint32_t sizes[N / 2];
#pragma unroll
    for (int j = 0; j < N / 2; ++j) {
      sizes[j] = P::magnitudes(block.at[i][j]);
      of_columns[j] = i == 0 ? sizes[j] : P::larger(of_columns[j], sizes[j]);
    }
    of_rows[i] = P::larger(P::larger(sizes[0], sizes[1]), P::larger(sizes[2], sizes[3]));
  }
#pragma unroll
  for (int j = 0; j < N / 2; ++j) of_columns[j] = P::larger(of_columns[j], shuffled(of_columns[j], LANES));
}

// Of the eight rows a lane ends up with one: this one; lanes with bit 1 have what others have too.
__device__ inline int row_of_lane(int lane) { return (lane & 8 ? 4 : 0) + (lane & 4 ? 2 : 0) + (lane & 1); }
__device__ constexpr int lane_of_row(int i) { return (i & 4 ? 8 : 0) + (i & 2 ? 4 : 0) + (i & 1); }

template <class T>
__device__ float row_peak(const uint32_t (&of_rows)[N], int lane) {
  using P = Pair<T>;
  uint32_t peaks[N / 2];  // of rows 2 k, 2 k + 1
#pragma unroll
  for (int k = 0; k < N / 2; ++k)
    peaks[k] = P::larger(__byte_perm(of_rows[2 * k], of_rows[2 * k + 1], 0x5410),
                         __byte_perm(of_rows[2 * k], of_rows[2 * k + 1], 0x7632));
  // Lanes give away the rows that they will not have.
  const bool third = lane & 8, second = lane & 4, first = lane & 1;
#pragma unroll
  for (int k = 0; k < 2; ++k)
    peaks[k] = P::larger(third ? peaks[k + 2] : peaks[k], shuffled(third ? peaks[k] : peaks[k + 2], 8));
  peaks[0] = P::larger(second ? peaks[1] : peaks[0], shuffled(second ? peaks[0] : peaks[1], 4));
  peaks[0] = P::larger(peaks[0], shuffled(peaks[0], 2));
  peaks[0] = P::larger(peaks[0], shuffled(peaks[0], 1));
  const float2 two = P::wide(peaks[0]);
  return first ? two.y : two.x;
}

// Of a column, over what the warps have left. 0 where all is NaN.
template <class T>
__device__ float column_peak(const uint4* peaks, int column) {
  const T* of_column = reinterpret_cast<const T*>(peaks) + column;
  float peak = 0.0f;
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) peak = fmaxf(peak, to_float(of_column[warp * TILE]));
  return peak;
}

// A tile's values to both copies.
template <class T>
__device__ void quantise_tile(const Block& block, const Fp8& out, uint32_t band, uint32_t strip, TileMemory& shared) {
  using P = Pair<T>;
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  const int64_t row = int64_t{band} * TILE + group * N;
  uint32_t of_rows[N], of_columns[N / 2];
  peaks_of<T>(block, of_rows, of_columns);
  if (threadIdx.x % 32 < LANES)
    shared.peaks[threadIdx.x / 32 * LANES + lane] =
        uint4{of_columns[0], of_columns[1], of_columns[2], of_columns[3]};
  __syncthreads();
  if (threadIdx.x < TILE) {
    const float scale = scale_of(column_peak<T>(shared.peaks, threadIdx.x), false);
    shared.inverses[threadIdx.x] = __frcp_rn(scale);
    if (out.codes_t != nullptr) out.scales_t[int64_t{band} * out.width + strip * TILE + threadIdx.x] = scale;
  }
  const float scale = scale_of(row_peak<T>(of_rows, lane), false), mine = __frcp_rn(scale);
  if (out.codes != nullptr && (lane & 2) == 0) out.scales[strip * out.padded + row + row_of_lane(lane)] = scale;
  __syncthreads();
  float inverses[N];
  const auto low = load<4>(shared.inverses + lane * N), high = load<4>(shared.inverses + lane * N + 4);
#pragma unroll
  for (int j = 0; j < 4; ++j) inverses[j] = low.at[j], inverses[j + 4] = high.at[j];
  uint8_t* codes = out.codes + row * out.width + int64_t{strip} * TILE + lane * N;
  uint32_t columns[N][2];
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const float above = __shfl_sync(0xffffffffu, mine, lane_of_row(i), LANES);
    const float below = __shfl_sync(0xffffffffu, mine, lane_of_row(i + 1), LANES);
    uint32_t rows[2][N / 2];
#pragma unroll
    for (int j = 0; j < N / 2; ++j) {
      const float2 a = P::wide(block.at[i][j]), b = P::wide(block.at[i + 1][j]);
      rows[0][j] = two_codes(a.x * above, a.y * above, false), rows[1][j] = two_codes(b.x * below, b.y * below, false);
      const uint32_t left = two_codes(a.x * inverses[2 * j], b.x * inverses[2 * j], false);
      const uint32_t right = two_codes(a.y * inverses[2 * j + 1], b.y * inverses[2 * j + 1], false);
      if (i % 4 == 0) {
        columns[2 * j][i / 4] = left, columns[2 * j + 1][i / 4] = right;
      } else {
        columns[2 * j][i / 4] = __byte_perm(columns[2 * j][i / 4], left, 0x5410);
        columns[2 * j + 1][i / 4] = __byte_perm(columns[2 * j + 1][i / 4], right, 0x5410);
      }
    }
    if (out.codes != nullptr) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint2 words{__byte_perm(rows[k][0], rows[k][1], 0x5410), __byte_perm(rows[k][2], rows[k][3], 0x5410)};
        uint2* to = reinterpret_cast<uint2*>(codes + (i + k) * out.width);
        *to = words;
      }
    }
  }
  if (out.codes_t == nullptr) return;
#pragma unroll
  for (int j = 0; j < N; ++j)
    shared.turned[(lane * N + j) * LANES + (group ^ lane)] = uint2{columns[j][0], columns[j][1]};
  __syncthreads();
  // 16 bytes of a column a thread: two words, which the swizzle leaves side by side.
#pragma unroll
  for (int step = 0; step < TILE; step += THREADS / N) {
    const int at = step + threadIdx.x / N, word = threadIdx.x % N, swizzle = at / N;
    const uint4 found = reinterpret_cast<const uint4*>(shared.turned)[at * (LANES / 2) + (word ^ swizzle / 2)];
    uint8_t* to = out.codes_t + (int64_t{strip} * TILE + at) * out.padded + int64_t{band} * TILE + word * 16;
    *reinterpret_cast<uint4*>(to) = swizzle % 2 == 0 ? found : uint4{found.z, found.w, found.x, found.y};
  }
}

// What a thread has of a tile.
template <class Source>
__device__ Block tile_of(const Source& source, const Fp8& out, uint32_t band, uint32_t strip) {
  constexpr int AT_ONCE = 4;  // rows, in registers
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  const int64_t row = int64_t{band} * TILE + group * N, column = int64_t{strip} * TILE + lane * N;
  const auto* from = source.from(row, column);
  const auto columns = source.columns(column);
  Block block;
#pragma unroll
  for (int first = 0; first < N; first += AT_ONCE) {
    uint4 pieces[AT_ONCE][Source::PIECES];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
      for (int piece = 0; piece < Source::PIECES; ++piece) {
        pieces[i][piece] = uint4{0, 0, 0, 0};
        if (row + first + i < out.rows)
          pieces[i][piece] = reinterpret_cast<const uint4*>(from + (first + i) * source.row_stride)[piece];
      }
    const auto rows = source.rows(row, out.rows);
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) source.finish(pieces[i], rows, first + i, columns, block.at[first + i]);
  }
  blank(block, out.rows - row);
  return block;
}

// blocks: both copies or one.
template <class Source>
__global__ void __launch_bounds__(THREADS, Source::BLOCKS) computed_tiles_kernel(const Source source, const Fp8 out) {
  __shared__ TileMemory shared;
  const uint32_t across = static_cast<uint32_t>(out.width / TILE), band = blockIdx.x / across, strip = blockIdx.x % across;
  quantise_tile<typename Source::Type>(tile_of(source, out, band, strip), out, band, strip, shared);
}

template <class Source>
int launch_computed_tiles(const Source& source, const Fp8& out, Stream stream) {
  const int64_t tiles = out.width / TILE * (out.padded / TILE);
  computed_tiles_kernel<<<static_cast<unsigned>(tiles), THREADS, 0, stream>>>(source, out);
  return launched();
}

}  // namespace megatune::cuda::fp8
