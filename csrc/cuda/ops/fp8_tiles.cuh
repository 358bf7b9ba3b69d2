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
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const uint32_t(&row)[N / 2] = block.at[i];
#pragma unroll
    for (int j = 0; j < N / 2; ++j) of_columns[j] = i == 0 ? row[j] : larger<T>(of_columns[j], row[j]);
    of_rows[i] = Pair<T>::magnitudes(larger<T>(larger<T>(row[0], row[1]), larger<T>(row[2], row[3])));
  }
#pragma unroll
  for (int j = 0; j < N / 2; ++j)
    of_columns[j] = Pair<T>::magnitudes(larger<T>(of_columns[j], shuffled(of_columns[j], LANES)));
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

// Who has a tile: THREADS threads, all of a thread block.
struct WholeBlock {
  int thread = static_cast<int>(threadIdx.x);
  __device__ void sync() const { __syncthreads(); }
};

// A tile's values to both copies.
template <class T, class Team>
__device__ void quantise_tile(const Block& block, const Fp8& out, uint32_t band, uint32_t strip, const Team& team,
                              uint2* turned, float* inverses_of_columns, uint4* peaks) {
  using P = Pair<T>;
  const int thread = team.thread, lane = thread % LANES, group = thread / LANES;
  const int64_t row = int64_t{band} * TILE + group * N;
  uint32_t of_rows[N], of_columns[N / 2];
  peaks_of<T>(block, of_rows, of_columns);
  if (thread % 32 < LANES)
    peaks[thread / 32 * LANES + lane] = uint4{of_columns[0], of_columns[1], of_columns[2], of_columns[3]};
  team.sync();
  if (thread < TILE) {
    const float scale = scale_of(column_peak<T>(peaks, thread), false);
    inverses_of_columns[thread] = __frcp_rn(scale);
    if (out.codes_t != nullptr) out.scales_t[int64_t{band} * out.width + strip * TILE + thread] = scale;
  }
  const float scale = scale_of(row_peak<T>(of_rows, lane), false), mine = __frcp_rn(scale);
  if (out.codes != nullptr && (lane & 2) == 0) out.scales[strip * out.padded + row + row_of_lane(lane)] = scale;
  team.sync();
  float inverses[N];
  const auto low = load<4>(inverses_of_columns + lane * N), high = load<4>(inverses_of_columns + lane * N + 4);
#pragma unroll
  for (int j = 0; j < 4; ++j) inverses[j] = low.at[j], inverses[j + 4] = high.at[j];
  uint8_t* to_row = out.codes + row * out.width + int64_t{strip} * TILE + lane * N;
  uint32_t columns[N][2];
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    float2 values[4][N / 2];
#pragma unroll
    for (int k = 0; k < 4; ++k, to_row += out.width) {
      const float inverse = __shfl_sync(0xffffffffu, mine, lane_of_row(i + k), LANES);
      uint32_t codes[2];
#pragma unroll
      for (int j = 0; j < N / 2; ++j) values[k][j] = P::wide(block.at[i + k][j]);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float2 one = values[k][2 * j], two = values[k][2 * j + 1];
        codes[j] = four_codes(one.x * inverse, one.y * inverse, two.x * inverse, two.y * inverse);
      }
      if (out.codes != nullptr) store_codes(to_row, uint2{codes[0], codes[1]});
    }
#pragma unroll
    for (int j = 0; j < N / 2; ++j) {
      const float left = inverses[2 * j], right = inverses[2 * j + 1];
      columns[2 * j][i / 4] =
          four_codes(values[0][j].x * left, values[1][j].x * left, values[2][j].x * left, values[3][j].x * left);
      columns[2 * j + 1][i / 4] =
          four_codes(values[0][j].y * right, values[1][j].y * right, values[2][j].y * right, values[3][j].y * right);
    }
  }
  if (out.codes_t == nullptr) return;
#pragma unroll
  for (int j = 0; j < N; ++j)
    turned[(lane * N + j) * LANES + (group ^ lane)] = uint2{columns[j][0], columns[j][1]};
  team.sync();
  // 16 bytes of a column a thread: two words, which the swizzle leaves side by side.
  const int word = thread % N;
  uint8_t* to = out.codes_t + (int64_t{strip} * TILE + thread / N) * out.padded + int64_t{band} * TILE + word * 16;
#pragma unroll
  for (int step = 0; step < TILE; step += THREADS / N, to += out.padded * (THREADS / N)) {
    const int at = step + thread / N, swizzle = at / N;
    const uint4 found = reinterpret_cast<const uint4*>(turned)[at * (LANES / 2) + (word ^ swizzle / 2)];
    store_codes(to, swizzle % 2 == 0 ? found : uint4{found.z, found.w, found.x, found.y});
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
  quantise_tile<typename Source::Type>(tile_of(source, out, band, strip), out, band, strip, WholeBlock{}, shared.turned,
                                       shared.inverses, shared.peaks);
}

template <class Source>
int launch_computed_tiles(const Source& source, const Fp8& out, Stream stream) {
  const int64_t tiles = out.width / TILE * (out.padded / TILE);
  computed_tiles_kernel<<<static_cast<unsigned>(tiles), THREADS, 0, stream>>>(source, out);
  return launched();
}

}  // namespace megatune::cuda::fp8
