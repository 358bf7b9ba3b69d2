// Quantising to fp8, whatever the values come from; fp8_quantise.cu, fp8_rms_norm.cu and fp8_glu.cu have the sources.
//
// A source gives eight neighbouring values of a row at a time, in the type T that they would be stored in:
//
//   columns(column)            what all rows need at these columns (a norm's weight)
//   raw(row, column)           what is kept of the input
//   finish(raw, rstd, columns) the values that are quantised
//
// COMPUTES: raw or finish do more than load; what does not says whether it loads WHOLE vectors.
//
// scale = largest magnitude / largest number of the format, NaN left out; 1 where there is nothing above 2^-100. A code
// is value * (1 / scale), rounded to the nearest, never beyond the largest number; NaN stays NaN.
//
// blocks and tiles: one pass, a thread block for 128 x 128 values, both copies from registers. rowwise, one copy: a
// thread block for a row. rowwise, transposed: the largest magnitudes of columns come first. A matrix as it is: a pass
// that only reads gives them and those of rows, and tiles give both copies; what is computed: the first pass gives the
// rows too, tiles the transposed copy. Tiles go backwards then, for the end of the matrix is still in the cache. All of
// that for what fp8_rowwise.cuh cannot take: fp32, and odd addresses.
#pragma once

#include "../common/launch.cuh"
#include "../common/reduce.cuh"
#include "fp8_values.cuh"
#include "megatune/cuda_fp8.h"

namespace megatune::cuda::fp8 {

// Numbers without a sign are ordered as their bits are.
__device__ inline void raise(float* peak, float value) {
  atomicMax(reinterpret_cast<int*>(peak), __float_as_int(value));
}

// Largest value over all threads of the block, a multiple of 32. shared: 32 floats.
__device__ inline float block_max(float value, float* shared) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, lane));
  if (blockDim.x == 32) return value;
  __syncthreads();  // everyone has read what was there before
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = threadIdx.x % 32 < blockDim.x / 32 ? shared[threadIdx.x % 32] : 0.0f;
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, lane));
  return value;
}

// Whether registers suffice for more blocks: not where values are computed, have four bytes or are loaded one by one.
template <class Source>
constexpr bool spare() {
  if constexpr (!Source::COMPUTES) return sizeof(typename Source::Type) == 2 && Source::WHOLE;
  return false;
}

// A row at a time: its rstd if the source is a norm, its codes and scale. A thread keeps up to CACHED vectors of the
// row; of longer rows the rest is read again, from the cache.
constexpr int ROW_THREADS = 512;
template <class Source, int CACHED, bool E5M2>
__global__ void __launch_bounds__(ROW_THREADS, 1) rows_kernel(const Source source, const Fp8 out) {
  using T = typename Source::Type;
  __shared__ float shared[32];
  const int vectors = static_cast<int>(out.width / N), threads = blockDim.x;
  // All threads of a block go through the loop equally often: they reduce together.
  for (int64_t row = blockIdx.x; row < out.padded; row += gridDim.x) {
    const bool here = row < out.rows;
    Values<T> values[CACHED];
#pragma unroll
    for (int i = 0; i < CACHED; ++i) {
      const int at = threadIdx.x + i * threads;
      values[i] = here && at < vectors ? source.raw(row, at * N) : zeros<T>();
    }
    float rstd = 0.0f;
    if constexpr (Source::NORMALISES) {
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < CACHED; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j) total += to_float(values[i].at[j]) * to_float(values[i].at[j]);
      for (int at = threadIdx.x + CACHED * threads; here && at < vectors; at += threads) {
        const Values<T> more = source.raw(row, at * N);
#pragma unroll
        for (int j = 0; j < N; ++j) total += to_float(more.at[j]) * to_float(more.at[j]);
      }
      rstd = source.rstd_of(row_sum(total, threads, shared), out.width);
      if (here && threadIdx.x == 0) source.rstd[row] = rstd;
    }
    Peaks<T> peaks;
#pragma unroll
    for (int i = 0; i < CACHED; ++i) {
      const int at = threadIdx.x + i * threads;
      if (!here || at >= vectors) continue;
      if constexpr (Source::NORMALISES) values[i] = source.finish(values[i], rstd, source.columns(at * N));
      peaks.add(values[i]);
    }
    for (int at = threadIdx.x + CACHED * threads; here && at < vectors; at += threads) {
      peaks.add(source.finish(source.raw(row, at * N), rstd, source.columns(at * N)));
    }
    const float scale = scale_of(block_max(peaks.largest(), shared), E5M2), inverse = __frcp_rn(scale);
    if (threadIdx.x == 0) out.scales[row] = scale;
    uint8_t* codes = out.codes + row * out.width;
#pragma unroll
    for (int i = 0; i < CACHED; ++i) {
      const int at = threadIdx.x + i * threads;
      if (at < vectors) store_codes(codes + at * N, row_codes(values[i], inverse, E5M2));
    }
    for (int at = threadIdx.x + CACHED * threads; at < vectors; at += threads) {
      const Values<T> more =
          here ? source.finish(source.raw(row, at * N), rstd, source.columns(at * N)) : zeros<T>();
      store_codes(codes + at * N, row_codes(more, inverse, E5M2));
    }
  }
}

constexpr int PANEL = 32 * N;  // columns of a block that looks for peaks

// Of a warp's eight rows from `row` on: the peaks of its columns grow, and those of the rows where they are wanted.
template <class T>
__device__ void take_peaks(const Values<T> (&values)[N], Peaks<T>& columns, const Fp8& out, int64_t row, int lane) {
#pragma unroll
  for (int i = 0; i < N; ++i) columns.add(values[i]);
  if (out.row_peaks == nullptr) return;
  float peaks[N];
  row_peaks(values, peaks);
  const float peak = spread<32>(peaks, lane);
  const int64_t mine = row + lane / 4;
  if (lane % 4 == 0 && mine < out.rows) raise(out.row_peaks + mine, peak);
}

// The peaks of a panel's columns, from column `first` on, from all warps. All threads of the block come here.
template <class T>
__device__ void leave_peaks(const Peaks<T>& columns, T (&of_warps)[WARPS][PANEL], const Fp8& out, int64_t first) {
  Values<T> of_warp;
  memcpy(&of_warp, columns.at, sizeof of_warp);
  store(of_warps[threadIdx.x / 32] + threadIdx.x % 32 * N, of_warp);
  __syncthreads();
  if (first + threadIdx.x >= out.width) return;
  float peak = 0.0f;
#pragma unroll
  for (int other = 0; other < WARPS; ++other) peak = fmaxf(peak, fabsf(to_float(of_warps[other][threadIdx.x])));
  raise(out.peaks + first + threadIdx.x, peak);
}

// Largest magnitudes of columns, and of rows where wanted. A block has 256 columns, its warps
// are one below the other, PASSES times eight rows of each. The peaks are zeros before.
constexpr int PASSES = 4;
template <class Source>
__global__ void __launch_bounds__(THREADS, spare<Source>() ? 3 : 2)
    peaks_kernel(const Source source, const Fp8 out) {
  using T = typename Source::Type;
  __shared__ alignas(16) T of_warps[WARPS][PANEL];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t across = (out.width + PANEL - 1) / PANEL;
  const int64_t first = int64_t{blockIdx.x % across} * PANEL, column = first + lane * N;
  const bool inside = column < out.width;
  Peaks<T> columns;
#pragma unroll 1
  for (int pass = 0; pass < PASSES; ++pass) {
    const int64_t row = (int64_t{blockIdx.x / across} * PASSES + pass) * (WARPS * N) + warp * N;
    if (row >= out.rows) break;
    Values<T> values[N];
#pragma unroll
    for (int i = 0; i < N; ++i)
      values[i] = inside && row + i < out.rows ? source.raw(row + i, column) : zeros<T>();
    take_peaks(values, columns, out, row, lane);
  }
  leave_peaks(columns, of_warps, out, first);
}

// Where the scale of a tile is, in rows padded to a multiple of four, and the ones behind a row that ends here.
__device__ inline void store_tile_scale(float* scales, int64_t row, int64_t column, int64_t columns, float scale) {
  float* to = scales + row * ((columns + 3) / 4 * 4);
  to[column] = scale;
  if (column == columns - 1)
    for (int64_t next = columns; next % 4 != 0; ++next) to[next] = 1.0f;
}

// Blocks on a multiprocessor that registers suffice for.
template <class Source, Scaling SCALING>
constexpr int tile_blocks() {
  if (spare<Source>()) return SCALING == Scaling::tiles ? 4 : 3;
  return 2;
}

// A tile of 128 x 128. A thread has 8 x 8 of the values; the transposed codes go through shared memory, where 16 bytes
// are sixteen rows of a column. Those of column c stand at g ^ (c / 8), their halves the other way round from c = 64
// on, so that neither side collides. rowwise: the columns' peaks are known, and where there are rows' peaks, the rows'
// codes are written too.
template <class Source, Scaling SCALING, bool E5M2>
__global__ void __launch_bounds__(THREADS, tile_blocks<Source, SCALING>())
    tiles_kernel(const Source source, const Fp8 out) {
  using T = typename Source::Type;
  __shared__ uint4 turned[TILE][LANES / 2];
  __shared__ alignas(16) T of_warps[WARPS][SCALING == Scaling::blocks ? TILE : 1];
  __shared__ alignas(16) float inverses[2 * TILE];  // of columns, of rows
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES, warp = threadIdx.x / 32;
  const uint32_t across = (out.width + TILE - 1) / TILE, down = (out.padded + TILE - 1) / TILE;
  const uint32_t tile = SCALING == Scaling::rowwise ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const uint32_t band = tile / across, strip = tile % across;
  const int64_t row = int64_t{band} * TILE + group * N;
  const int column = strip * TILE + lane * N;  // the width is below 2^31
  const bool inside = column < out.width;
  // rowwise: half of the threads have a column's scale each, the others a row's. Their peaks come with the values.
  const bool of_column = threadIdx.x < TILE;
  const int64_t with_scale = int64_t{of_column ? strip : band} * TILE + threadIdx.x % TILE;
  float scale = 1.0f, inverse = 1.0f, peak = -1.0f;
  if constexpr (SCALING == Scaling::rowwise) {
    const float* peaks = of_column ? out.peaks : out.row_peaks;
    if (peaks != nullptr && with_scale < (of_column ? out.width : out.padded)) peak = peaks[with_scale];
  }
  Values<T> values[N];
  const auto columns = source.columns(inside ? column : 0);
#pragma unroll
  for (int i = 0; i < N; ++i)
    values[i] = inside && row + i < out.rows ? source.raw(row + i, column) : zeros<T>();
  if constexpr (Source::NORMALISES) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      // Padding is not finished: weights below 0 would make zeros of it that have a sign, infinite ones NaN.
      const bool here = row + i < out.rows;
      const auto finished = source.finish(values[i], here ? source.rstd[row + i] : 0.0f, columns);
      values[i] = here ? finished : zeros<T>();
    }
  }

  constexpr bool IN_TILES = SCALING == Scaling::tiles || SCALING == Scaling::mixed;  // the transposed copy
  constexpr bool IN_BLOCKS = SCALING == Scaling::blocks || SCALING == Scaling::mixed;  // the other one
  float tile_inverse = 1.0f;
  if constexpr (IN_TILES) {
    Peaks<T> peaks;
#pragma unroll
    for (int i = 0; i < N; ++i) peaks.add(values[i]);
    scale = scale_of(block_max(peaks.largest(), inverses), false), tile_inverse = inverse = __frcp_rn(scale);
    if (threadIdx.x == 0) {
      if (!IN_BLOCKS && out.codes != nullptr) store_tile_scale(out.scales, band, strip, across, scale);
      if (out.codes_t != nullptr) store_tile_scale(out.scales_t, strip, band, down, scale);
    }
  }
  if constexpr (SCALING == Scaling::rowwise) {
    scale = scale_of(peak, E5M2);
    inverses[threadIdx.x] = __frcp_rn(scale);
    if (peak >= 0.0f && (of_column ? band : strip) == 0) (of_column ? out.scales_t : out.scales)[with_scale] = scale;
    __syncthreads();
  }
  if constexpr (SCALING == Scaling::blocks) {
    if (out.codes_t != nullptr) {
      Peaks<T> of_columns;
#pragma unroll
      for (int i = 0; i < N; ++i) of_columns.add(values[i]);
      of_columns.join_lane(LANES);
      Values<T> of_warp;
      memcpy(&of_warp, of_columns.at, sizeof of_warp);
      if (threadIdx.x % 32 < LANES) store(of_warps[warp] + lane * N, of_warp);
      __syncthreads();
      if (threadIdx.x < TILE) {
        peak = 0.0f;
#pragma unroll
        for (int other = 0; other < WARPS; ++other)
          peak = fmaxf(peak, fabsf(to_float(of_warps[other][threadIdx.x])));
        scale = scale_of(peak, false);
        inverses[threadIdx.x] = __frcp_rn(scale);
        out.scales_t[band * out.width + strip * TILE + threadIdx.x] = scale;
      }
    }
  }

  const bool of_rows = SCALING == Scaling::rowwise ? out.row_peaks != nullptr && inside && row < out.padded
                                                   : out.codes != nullptr;
  if (of_rows) {
    uint8_t* codes = out.codes + row * out.width + column;
    if constexpr (IN_BLOCKS) {
      float peaks[N];
      row_peaks(values, peaks);
      scale = scale_of(spread<LANES>(peaks, lane), false), inverse = __frcp_rn(scale);  // of row lane / 2
      if (lane % 2 == 0) out.scales[int64_t{strip} * out.padded + row + lane / 2] = scale;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float of_row = inverse;
      if constexpr (IN_BLOCKS) of_row = __shfl_sync(0xffffffffu, inverse, 2 * i, LANES);
      if constexpr (SCALING == Scaling::rowwise) of_row = inverses[TILE + group * N + i];
      store_codes(codes + i * out.width, row_codes(values[i], of_row, E5M2));
    }
  }
  if (out.codes_t == nullptr) return;
  if constexpr (SCALING == Scaling::blocks) __syncthreads();
  const int half = (group / 2 ^ lane % 8) * 2 + (group % 2 ^ lane / 8);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if constexpr (!IN_TILES) inverse = inverses[lane * N + j];
    reinterpret_cast<uint2*>(turned[lane * N + j])[half] =
        column_codes(values, j, IN_TILES ? tile_inverse : inverse, E5M2);
  }
  __syncthreads();
#pragma unroll
  for (int step = 0; step < TILE; step += THREADS / 8) {
    const int at = step + threadIdx.x / 8, part = threadIdx.x % 8;  // a column of the tile, sixteen of its rows
    uint4 codes = turned[at][part ^ at / N % 8];
    if (step >= TILE / 2) codes = {codes.z, codes.w, codes.x, codes.y};
    const int64_t to_row = int64_t{strip} * TILE + at, to_column = int64_t{band} * TILE + part * 16;
    if (to_row < out.width && to_column < out.padded) store_codes(out.codes_t + to_row * out.padded + to_column, codes);
  }
}

template <class Source, int CACHED, bool E5M2>
int launch_rows(const Source& source, const Fp8& out, Stream stream) {
  const int64_t vectors = out.width / N;
  // Four vectors a thread where that is enough.
  const int64_t wanted = ((vectors + 3) / 4 + 31) / 32 * 32;
  const int threads = static_cast<int>(std::min<int64_t>(wanted, ROW_THREADS));
  rows_kernel<Source, CACHED, E5M2><<<grid(out.padded, 1), threads, 0, stream>>>(source, out);
  return launched();
}

template <class Source, Scaling SCALING, bool E5M2 = false>
int launch_tiles(const Source& source, const Fp8& out, Stream stream) {
  const int64_t tiles = (out.width + TILE - 1) / TILE * ((out.padded + TILE - 1) / TILE);
  tiles_kernel<Source, SCALING, E5M2><<<static_cast<unsigned>(tiles), THREADS, 0, stream>>>(source, out);
  return launched();
}

// Row-wise, one copy by rows.
template <class Source, bool E5M2 = false>
int launch_row_copy(const Source& source, const Fp8& out, Stream stream) {
  // Twice as many vectors in a thread where a block's threads do not suffice; fp32 has no registers for them.
  constexpr int more = sizeof(typename Source::Type) == 2 ? 8 : 4;
  if (more > 4 && out.width > int64_t{ROW_THREADS} * 4 * N)
    return launch_rows<Source, more, E5M2>(source, out, stream);
  return launch_rows<Source, 4, E5M2>(source, out, stream);
}

// Row-wise, a transposed copy and perhaps one by rows: peaks of columns, and of rows if wanted; then all codes.
template <class Source, bool E5M2 = false>
int launch_columns(const Source& source, const Fp8& out, Stream stream) {
  // Those of rows stand behind those of columns.
  const int64_t peaks = out.width + (out.row_peaks != nullptr ? out.padded : 0);
  const auto error = cudaMemsetAsync(out.peaks, 0, peaks * sizeof(float), stream);
  if (error != cudaSuccess) return static_cast<int>(error);
  if (out.rows > 0) {
    const int64_t across = (out.width + PANEL - 1) / PANEL, height = PASSES * WARPS * N;
    const auto blocks = static_cast<unsigned>(across * ((out.rows + height - 1) / height));
    peaks_kernel<Source><<<blocks, THREADS, 0, stream>>>(source, out);
    if (const int failed = launched()) return failed;
  }
  return launch_tiles<Source, Scaling::rowwise, E5M2>(source, out, stream);
}

template <class Source, bool E5M2 = false>
int launch_rowwise(const Source& source, const Fp8& out, Stream stream) {
  return out.codes_t == nullptr ? launch_row_copy<Source, E5M2>(source, out, stream)
                                : launch_columns<Source, E5M2>(source, out, stream);
}

}  // namespace megatune::cuda::fp8
