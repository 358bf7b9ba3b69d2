// Row-wise scales of types of 16 bits: a transposed copy, or both. The sources are those of fp8_tiles.cuh; of one that
// NORMALISES, Rows hold a row's rstd, which stands in `rstd` once the first pass is over, and column_peak() reads what
// that left in `peaks`.
//
// No code can be written before the largest magnitudes of all columns are known: a first pass only reads, the second
// one makes tiles. It goes backwards, for the end of the matrix is still in the cache, and its blocks begin to load
// while the last ones of the first pass end.
#pragma once

#include "../common/dependent.cuh"
#include "fp8_tiles.cuh"

namespace megatune::cuda::fp8 {

// Blocks of the first pass on a multiprocessor: the registers for more are there where nothing is computed.
template <class Source>
constexpr int panel_blocks() { return Source::PIECES == 1 ? 4 : 2; }

// First pass of what does not normalise. A block has 256 columns, its warps are one below the other, with eight rows
// each; all blocks are at work at the same time, `slices` of them for the same columns, and go down together.
template <class Source>
__global__ void __launch_bounds__(THREADS, panel_blocks<Source>())
    panels_kernel(const Source source, const Fp8 out, int slices) {
  using T = typename Source::Type;
  __shared__ alignas(16) T of_warps[WARPS][PANEL];
  let_next_begin();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t across = (out.width + PANEL - 1) / PANEL;
  const int64_t first = int64_t{blockIdx.x % across} * PANEL, column = first + lane * N;
  const bool inside = column < out.width;
  const auto at_columns = source.columns(inside ? column : 0);
  Peaks<T> columns;
#pragma unroll 1
  for (int64_t row = (int64_t{blockIdx.x / across} * WARPS + warp) * N; row < out.rows;
       row += int64_t{slices} * WARPS * N) {
    uint4 pieces[N][Source::PIECES];
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int piece = 0; piece < Source::PIECES; ++piece) {
        pieces[i][piece] = uint4{0, 0, 0, 0};
        if (inside && row + i < out.rows)
          pieces[i][piece] = reinterpret_cast<const uint4*>(source.from(row + i, column))[piece];
      }
    Values<T> values[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      uint32_t words[N / 2];
      source.finish(pieces[i], typename Source::Rows{}, i, at_columns, words);
      memcpy(&values[i], words, sizeof words);
    }
    take_peaks(values, columns, out, row, lane);
  }
  leave_peaks(columns, of_warps, out, first);
}

// Whether what a tile's threads have asked for waits in shared memory, so that registers suffice for one block more.
template <class Source>
constexpr bool WAITS = Source::PIECES == 1;

// Second pass: the tiles of fp8_tiles.cuh, at the edges fewer values. Known are the columns' peaks, and if there are
// codes of rows, the rows' scales (of what normalises) or peaks.
template <class Source, bool E5M2>
__global__ void __launch_bounds__(THREADS, Source::BLOCKS) scaled_tiles_kernel(const Source source, const Fp8 out) {
  using T = typename Source::Type;
  using P = Pair<T>;
  constexpr bool WAITING = WAITS<Source>;
  constexpr int PIECES = Source::PIECES, AT_ONCE = WAITING ? 1 : N / PIECES;  // rows, in registers
  __shared__ uint2 turned[TILE * LANES];  // transposed codes: word w (eight rows) of column c at w ^ (c / 8)
  __shared__ alignas(16) float inverses[2 * TILE];  // of the scales of columns, of rows
  __shared__ float rstds[Source::NORMALISES ? TILE : 1];
  extern __shared__ uint4 waiting[];  // [row, piece, thread]; each thread has its own
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  const uint32_t across = (out.width + TILE - 1) / TILE, tile = gridDim.x - 1 - blockIdx.x;
  const uint32_t band = tile / across, strip = tile % across;
  const int64_t row = int64_t{band} * TILE + group * N;
  const int column = strip * TILE + lane * N;  // the width is at most 2^30
  const bool inside = column < out.width;
  const auto at_columns = source.columns(inside ? column : 0);
  uint4 pieces[AT_ONCE][PIECES];
  const auto fetch = [&](int begin) {
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
      for (int piece = 0; piece < PIECES; ++piece) {
        pieces[i][piece] = uint4{0, 0, 0, 0};
        if (inside && row + begin + i < out.rows)
          pieces[i][piece] = reinterpret_cast<const uint4*>(source.from(row + begin + i, column))[piece];
      }
  };
  uint4* const mine = waiting + threadIdx.x;
  if constexpr (WAITING) {
#pragma unroll
    for (int i = 0; i < N * PIECES; ++i) {
      const bool here = inside && row + i / PIECES < out.rows;  // else zeros
      const T* from = source.from(here ? row + i / PIECES : 0, here ? column : 0) + i % PIECES * N;
      const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(mine + i * THREADS));
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(here ? 16 : 0)
                   : "memory");
    }
  } else {
    fetch(0);
  }
  wait_for_previous();

  // Half of the threads have a column's scale each, the others a row's.
  const bool of_column = threadIdx.x < TILE;
  const int64_t with_scale = int64_t{of_column ? strip : band} * TILE + threadIdx.x % TILE;
  float scale = 1.0f, rstd = 0.0f;
  if (of_column && with_scale < out.width) {
    float peak;
    if constexpr (Source::NORMALISES) {
      peak = source.column_peak(out, with_scale);
    } else {
      peak = out.peaks[with_scale];
    }
    scale = scale_of(peak, E5M2);
    if (band == 0) out.scales_t[with_scale] = scale;
  } else if (!of_column && with_scale < out.padded && out.codes != nullptr) {
    if constexpr (Source::NORMALISES) {
      scale = out.scales[with_scale];
      if (with_scale < out.rows) rstd = source.rstd[with_scale];
    } else {
      scale = scale_of(out.row_peaks[with_scale], E5M2);
      if (strip == 0) out.scales[with_scale] = scale;
    }
  }
  inverses[threadIdx.x] = __frcp_rn(scale);
  if constexpr (Source::NORMALISES)
    if (!of_column) rstds[threadIdx.x - TILE] = rstd;
  if constexpr (WAITING) asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  float of_columns[N];
  const auto low = load<4>(inverses + lane * N), high = load<4>(inverses + lane * N + 4);
#pragma unroll
  for (int j = 0; j < 4; ++j) of_columns[j] = low.at[j], of_columns[j + 4] = high.at[j];

  uint8_t* codes = out.codes + row * out.width + column;
  const bool of_rows = out.codes != nullptr && inside && row < out.padded;
  uint32_t columns[N][2];
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    if constexpr (!WAITING)
      if (i > 0 && i % AT_ONCE == 0) fetch(i);
    uint32_t y[2][N / 2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      typename Source::Rows of_row{};
      if constexpr (Source::NORMALISES) of_row.rstd = rstds[group * N + i + k];
      if constexpr (WAITING) {
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) pieces[0][piece] = mine[((i + k) * PIECES + piece) * THREADS];
      }
      source.finish(pieces[(i + k) % AT_ONCE], of_row, i + k, at_columns, y[k]);
      // Padding is not finished: weights below 0 would make zeros of it that have a sign, infinite ones NaN.
      if (Source::NORMALISES && row + i + k >= out.rows) y[k][0] = y[k][1] = y[k][2] = y[k][3] = 0;
    }
    const float above = inverses[TILE + group * N + i], below = inverses[TILE + group * N + i + 1];
    uint32_t rows[2][N / 2];
#pragma unroll
    for (int j = 0; j < N / 2; ++j) {
      const float2 a = P::wide(y[0][j]), b = P::wide(y[1][j]);
      rows[0][j] = two_codes(a.x * above, a.y * above, E5M2), rows[1][j] = two_codes(b.x * below, b.y * below, E5M2);
      const uint32_t left = two_codes(a.x * of_columns[2 * j], b.x * of_columns[2 * j], E5M2);
      const uint32_t right = two_codes(a.y * of_columns[2 * j + 1], b.y * of_columns[2 * j + 1], E5M2);
      if (i % 4 == 0) {
        columns[2 * j][i / 4] = left, columns[2 * j + 1][i / 4] = right;
      } else {
        columns[2 * j][i / 4] = __byte_perm(columns[2 * j][i / 4], left, 0x5410);
        columns[2 * j + 1][i / 4] = __byte_perm(columns[2 * j + 1][i / 4], right, 0x5410);
      }
    }
    if (of_rows) {
#pragma unroll
      for (int k = 0; k < 2; ++k)
        store_codes(codes + (i + k) * out.width,
                    uint2{__byte_perm(rows[k][0], rows[k][1], 0x5410), __byte_perm(rows[k][2], rows[k][3], 0x5410)});
    }
  }
#pragma unroll
  for (int j = 0; j < N; ++j) turned[(lane * N + j) * LANES + (group ^ lane)] = uint2{columns[j][0], columns[j][1]};
  __syncthreads();
  // 16 bytes of a column a thread: two words, which the swizzle leaves side by side.
#pragma unroll
  for (int step = 0; step < TILE; step += THREADS / N) {
    const int at = step + threadIdx.x / N, word = threadIdx.x % N, swizzle = at / N;
    const uint4 found = reinterpret_cast<const uint4*>(turned)[at * (LANES / 2) + (word ^ swizzle / 2)];
    const int64_t to_row = int64_t{strip} * TILE + at, to_column = int64_t{band} * TILE + word * 16;
    if (to_row < out.width && to_column < out.padded)
      store_codes(out.codes_t + to_row * out.padded + to_column,
                  swizzle % 2 == 0 ? found : uint4{found.z, found.w, found.x, found.y});
  }
}

template <class Source, bool E5M2>
int launch_scaled_tiles(const Source& source, const Fp8& out, Stream stream) {
  const int64_t tiles = (out.width + TILE - 1) / TILE * ((out.padded + TILE - 1) / TILE);
  constexpr int shared = WAITS<Source> ? N * Source::PIECES * THREADS * 16 : 0;
  const auto kernel = scaled_tiles_kernel<Source, E5M2>;
  const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return static_cast<int>(error);
  return launch_early(kernel, static_cast<unsigned>(tiles), THREADS, shared, stream, source, out);
}

template <class Source, bool E5M2 = false>
int launch_panels(const Source& source, const Fp8& out, Stream stream) {
  // Those of rows stand behind those of columns.
  const int64_t peaks = out.width + (out.row_peaks != nullptr ? out.padded : 0);
  const auto error = cudaMemsetAsync(out.peaks, 0, peaks * sizeof(float), stream);
  if (error != cudaSuccess) return static_cast<int>(error);
  if (out.rows > 0) {
    const int64_t across = (out.width + PANEL - 1) / PANEL, most = (out.rows + WARPS * N - 1) / (WARPS * N);
    const int64_t resident = int64_t{multiprocessors()} * panel_blocks<Source>();
    const int slices = static_cast<int>(std::clamp<int64_t>(resident / across, 1, most));
    panels_kernel<Source><<<static_cast<unsigned>(across * slices), THREADS, 0, stream>>>(source, out, slices);
    if (const int failed = launched()) return failed;
  }
  return launch_scaled_tiles<Source, E5M2>(source, out, stream);
}

}  // namespace megatune::cuda::fp8
