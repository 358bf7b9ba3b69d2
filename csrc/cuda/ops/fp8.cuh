// Quantising to fp8, whatever the values come from; fp8_quantise.cu, fp8_rms_norm.cu and fp8_glu.cu have the sources.
//
// A source gives eight neighbouring values of a row at a time, in the type T that they would be stored in:
//
//   columns(column)            what all rows need at these columns (a norm's weight)
//   raw(row, column)           what is kept of the input
//   finish(raw, rstd, columns) the values that are quantised
//
// scale = largest magnitude / largest number of the format, NaN left out; 1 where there is nothing above 2^-100. A code
// is value * (1 / scale), rounded to the nearest, never beyond the largest number; NaN stays NaN.
//
// blocks and tiles: one pass, a thread block for 128 x 128 values, both copies from registers. rowwise: the first pass
// gives the rows and the largest magnitudes of the columns, the second one the transposed copy; it goes backwards, for
// the end of the matrix is still in the cache.
#pragma once

#include <cfloat>

#include "../common/launch.cuh"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "megatune/cuda_fp8.h"

namespace megatune::cuda::fp8 {

constexpr int N = 8;     // values of a thread in a row
constexpr int TILE = 128;
constexpr int LANES = TILE / N;      // threads of a tile's row; each has N rows too
constexpr int THREADS = LANES * LANES;
constexpr int row_threads(int cached) { return cached == 8 ? 384 : 512; }  // of the first pass, at most
constexpr int WARPS = THREADS / 32;

template <class T>
using Values = Vec<T, N>;

// Eight values in 16 byte loads, or one by one where addresses are odd.
template <class T>
__device__ Values<T> load_values(const T* from, bool vectors) {
  constexpr int step = 16 / sizeof(T);
  Values<T> values;
#pragma unroll
  for (int i = 0; i < N; i += step) {
    if (vectors) {
      const auto part = load<step>(from + i);
#pragma unroll
      for (int j = 0; j < step; ++j) values.at[i + j] = part.at[j];
    } else {
#pragma unroll
      for (int j = 0; j < step; ++j) values.at[i + j] = from[i + j];
    }
  }
  return values;
}

template <class T>
bool in_vectors(const void* x, int64_t row_stride) {
  return row_stride % (16 / static_cast<int64_t>(sizeof(T))) == 0 && aligned({x});
}

template <class T>
struct PairOf {};
template <>
struct PairOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};
template <>
struct PairOf<__half> {
  using Type = __half2;
};

// The largest magnitudes so far of eight columns; NaN is left out. Exact in T.
template <class T>
struct Peaks {
  typename PairOf<T>::Type at[N / 2];

  __device__ Peaks() {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) at[i].x = at[i].y = from_float<T>(0.0f);
  }
  __device__ void add(const Values<T>& values) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      typename PairOf<T>::Type two;
      two.x = values.at[2 * i], two.y = values.at[2 * i + 1];
      at[i] = __hmax2(at[i], __habs2(two));
    }
  }
  __device__ float of(int column) const { return to_float(column % 2 == 0 ? at[column / 2].x : at[column / 2].y); }
  __device__ float largest() const {
    const auto two = __hmax2(__hmax2(at[0], at[1]), __hmax2(at[2], at[3]));
    return fmaxf(to_float(two.x), to_float(two.y));
  }
};

template <>
struct Peaks<float> {
  float at[N];

  __device__ Peaks() {
#pragma unroll
    for (int i = 0; i < N; ++i) at[i] = 0.0f;
  }
  __device__ void add(const Values<float>& values) {
#pragma unroll
    for (int i = 0; i < N; ++i) at[i] = fmaxf(at[i], fabsf(values.at[i]));
  }
  __device__ float of(int column) const { return at[column]; }
  __device__ float largest() const {
    float peak = at[0];
#pragma unroll
    for (int i = 1; i < N; ++i) peak = fmaxf(peak, at[i]);
    return peak;
  }
};

__device__ inline float scale_of(float peak, bool e5m2) {
  return peak > 0x1p-100f ? peak * (e5m2 ? 1.0f / 57344.0f : 1.0f / 448.0f) : 1.0f;
}

// Two codes, that of `low` in the low byte.
__device__ inline uint32_t two_codes(float low, float high, bool e5m2) {
#if __CUDA_ARCH__ >= 890
  uint16_t codes;
  if (e5m2) {
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  }
  return codes;
#else
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float value = i == 0 ? low : high;
    const int bits = e5m2 ? 2 : 3, bias = e5m2 ? 15 : 7, cut = 23 - bits;
    const float least = e5m2 ? 0x1p-14f : 0x1p-6f;  // below it numbers are evenly spaced
    const float magnitude = fminf(fabsf(value), e5m2 ? 57344.0f : 448.0f);
    uint32_t code;
    if (value != value) {
      code = 0x7f;
    } else if (magnitude < least) {
      code = __float2int_rn(magnitude * ((1 << bits) / least));
    } else {
      const uint32_t word = __float_as_uint(magnitude);
      code = ((word + (1u << (cut - 1)) - 1 + (word >> cut & 1)) >> cut) - ((127 - bias) << bits);
    }
    if (value == value) code |= __float_as_uint(value) >> 24 & 0x80;
    codes |= code << 8 * i;
  }
  return codes;
#endif
}

__device__ inline uint2 eight_codes(const float (&values)[N], bool e5m2) {
  uint2 codes;
  codes.x = two_codes(values[0], values[1], e5m2) | two_codes(values[2], values[3], e5m2) << 16;
  codes.y = two_codes(values[4], values[5], e5m2) | two_codes(values[6], values[7], e5m2) << 16;
  return codes;
}

template <class T>
__device__ uint2 row_codes(const Values<T>& values, float inverse, bool e5m2) {
  float scaled[N];
#pragma unroll
  for (int i = 0; i < N; ++i) scaled[i] = to_float(values.at[i]) * inverse;
  return eight_codes(scaled, e5m2);
}

__device__ inline void store_codes(uint8_t* to, uint2 codes) { *reinterpret_cast<uint2*>(to) = codes; }

// Numbers without a sign are ordered as their bits are.
__device__ inline void raise(float* peak, float value) {
  atomicMax(reinterpret_cast<int*>(peak), __float_as_int(value));
}

template <class T>
__device__ Values<T> zeros() {
  Values<T> values;
#pragma unroll
  for (int i = 0; i < N; ++i) values.at[i] = from_float<T>(0.0f);
  return values;
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

// A row at a time: its rstd if the source is a norm, its codes and scale, and what it adds to the columns' peaks. A
// thread keeps up to CACHED vectors of the row; of longer rows the rest is read again, from the cache.
template <class Source, int CACHED>
__global__ void __launch_bounds__(row_threads(CACHED)) rows_kernel(const Source source, const Fp8 out) {
  using T = typename Source::Type;
  __shared__ float shared[32];
  const int vectors = static_cast<int>(out.width / N), threads = blockDim.x;
  const bool quantises = out.codes != nullptr || out.peaks != nullptr;
  Peaks<T> columns[CACHED];
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
    if (!quantises) continue;
    Peaks<T> peaks;
#pragma unroll
    for (int i = 0; i < CACHED; ++i) {
      const int at = threadIdx.x + i * threads;
      if (!here || at >= vectors) continue;
      if constexpr (Source::NORMALISES) values[i] = source.finish(values[i], rstd, source.columns(at * N));
      peaks.add(values[i]);
      columns[i].add(values[i]);
    }
    for (int at = threadIdx.x + CACHED * threads; here && at < vectors; at += threads) {
      const Values<T> more = source.finish(source.raw(row, at * N), rstd, source.columns(at * N));
      peaks.add(more);
      if (out.peaks != nullptr) {
        Peaks<T> of_columns;
        of_columns.add(more);
#pragma unroll
        for (int j = 0; j < N; ++j) raise(out.peaks + at * N + j, of_columns.of(j));
      }
    }
    if (out.codes == nullptr) continue;
    const float scale = scale_of(block_max(peaks.largest(), shared), out.e5m2), inverse = __frcp_rn(scale);
    if (threadIdx.x == 0) out.scales[row] = scale;
    uint8_t* codes = out.codes + row * out.width;
#pragma unroll
    for (int i = 0; i < CACHED; ++i) {
      const int at = threadIdx.x + i * threads;
      if (at < vectors) store_codes(codes + at * N, row_codes(values[i], inverse, out.e5m2));
    }
    for (int at = threadIdx.x + CACHED * threads; at < vectors; at += threads) {
      const Values<T> more =
          here ? source.finish(source.raw(row, at * N), rstd, source.columns(at * N)) : zeros<T>();
      store_codes(codes + at * N, row_codes(more, inverse, out.e5m2));
    }
  }
  if (out.peaks == nullptr) return;
#pragma unroll
  for (int i = 0; i < CACHED; ++i) {
    const int at = threadIdx.x + i * threads;
    if (at >= vectors) continue;
#pragma unroll
    for (int j = 0; j < N; ++j) raise(out.peaks + at * N + j, columns[i].of(j));
  }
}

// Where the scale of a tile is, in rows padded to a multiple of four, and the ones behind a row that ends here.
__device__ inline void store_tile_scale(float* scales, int64_t row, int64_t column, int64_t columns, float scale) {
  float* to = scales + row * ((columns + 3) / 4 * 4);
  to[column] = scale;
  if (column == columns - 1)
    for (int64_t next = columns; next % 4 != 0; ++next) to[next] = 1.0f;
}

// What leaves registers for three blocks on a multiprocessor.
template <class Source>
constexpr bool LIGHT = sizeof(typename Source::Type) == 2 && !Source::COMPUTES;

// A tile of 128 x 128. A thread has 8 x 8 of the values; the transposed codes go through shared
// memory, eight rows of a column in a word. Word w of column c stands at w ^ (c / 8), so that neither side collides.
// rowwise: the transposed copy only, with the columns' peaks that the first pass has left.
template <class Source, Scaling SCALING>
__global__ void __launch_bounds__(THREADS, LIGHT<Source> && SCALING == Scaling::rowwise ? 3 : 2)
    tiles_kernel(const Source source, const Fp8 out) {
  using T = typename Source::Type;
  __shared__ uint2 turned[TILE][LANES];
  __shared__ float of_warps[WARPS][TILE];
  __shared__ float inverses[TILE];
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES, warp = threadIdx.x / 32;
  const uint32_t across = (out.width + TILE - 1) / TILE, down = (out.padded + TILE - 1) / TILE;
  const uint32_t tile = SCALING == Scaling::rowwise ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const uint32_t band = tile / across, strip = tile % across;
  const int64_t row = int64_t{band} * TILE + group * N;
  const int column = strip * TILE + lane * N;  // the width is below 2^31
  const bool inside = column < out.width;
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

  float inverse = 1.0f;
  if constexpr (SCALING == Scaling::tiles) {
    Peaks<T> peaks;
#pragma unroll
    for (int i = 0; i < N; ++i) peaks.add(values[i]);
    const float scale = scale_of(block_max(peaks.largest(), inverses), false);
    if (threadIdx.x == 0) {
      if (out.codes != nullptr) store_tile_scale(out.scales, band, strip, across, scale);
      if (out.codes_t != nullptr) store_tile_scale(out.scales_t, strip, band, down, scale);
    }
    inverse = __frcp_rn(scale);
    if (out.codes != nullptr) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        store_codes(out.codes + (row + i) * out.width + column, row_codes(values[i], inverse, false));
    }
  }
  if constexpr (SCALING == Scaling::blocks) {
    if (out.codes != nullptr) {
      uint8_t* codes = out.codes + row * out.width + column;
      float* scales = out.scales + int64_t{strip} * out.padded + row;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        Peaks<T> of_row;
        of_row.add(values[i]);
        float peak = of_row.largest();
#pragma unroll
        for (int other = LANES / 2; other > 0; other /= 2)
          peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, other));
        const float scale = scale_of(peak, false);
        if (lane == 0) scales[i] = scale;
        store_codes(codes + i * out.width, row_codes(values[i], __frcp_rn(scale), false));
      }
    }
  }
  if (out.codes_t == nullptr) return;
  if constexpr (SCALING == Scaling::blocks) {
    Peaks<T> of_columns;
#pragma unroll
    for (int i = 0; i < N; ++i) of_columns.add(values[i]);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float peak = of_columns.of(j), other = __shfl_xor_sync(0xffffffffu, peak, LANES);
      if (threadIdx.x % 32 < LANES) of_warps[warp][lane * N + j] = fmaxf(peak, other);
    }
    __syncthreads();
    if (threadIdx.x < TILE) {
      float peak = of_warps[0][threadIdx.x];
#pragma unroll
      for (int other = 1; other < WARPS; ++other) peak = fmaxf(peak, of_warps[other][threadIdx.x]);
      const float scale = scale_of(peak, false);
      inverses[threadIdx.x] = __frcp_rn(scale);
      out.scales_t[band * out.width + strip * TILE + threadIdx.x] = scale;
    }
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if constexpr (SCALING == Scaling::blocks) inverse = inverses[lane * N + j];
    if constexpr (SCALING == Scaling::rowwise) {
      const float scale = scale_of(inside ? out.peaks[column + j] : 0.0f, out.e5m2);
      if (inside && band == 0 && group == 0) out.scales_t[column + j] = scale;
      inverse = __frcp_rn(scale);
    }
    float scaled[N];
#pragma unroll
    for (int i = 0; i < N; ++i) scaled[i] = to_float(values[i].at[j]) * inverse;
    turned[lane * N + j][group ^ lane] = eight_codes(scaled, SCALING == Scaling::rowwise && out.e5m2);
  }
  __syncthreads();
#pragma unroll
  for (int step = 0; step < N; ++step) {
    const int at = step * LANES + group;  // a column of the tile; `lane` counts its words
    const int64_t to_row = strip * TILE + at, to_column = int64_t{band} * TILE + lane * N;
    if (to_row < out.width && to_column < out.padded)
      store_codes(out.codes_t + to_row * out.padded + to_column, turned[at][lane ^ (at / N)]);
  }
}

template <class Source, int CACHED>
int launch_rows(const Source& source, const Fp8& out, Stream stream) {
  const int64_t vectors = out.width / N;
  // Four vectors a thread where that is enough.
  const int64_t wanted = ((vectors + 3) / 4 + 31) / 32 * 32;
  const int threads = static_cast<int>(std::min<int64_t>(wanted, row_threads(CACHED)));
  unsigned blocks = grid(out.padded, 1);
  if (out.peaks != nullptr) {
    // Peaks of columns stay in registers: as many blocks as are at work at the same time.
    int each = 1;
    if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, rows_kernel<Source, CACHED>, threads, 0) != cudaSuccess)
      each = 1;
    blocks = static_cast<unsigned>(std::min<int64_t>(out.padded, int64_t{multiprocessors()} * std::max(each, 1)));
  }
  rows_kernel<Source, CACHED><<<blocks, threads, 0, stream>>>(source, out);
  return launched();
}

template <class Source, Scaling SCALING>
int launch_tiles(const Source& source, const Fp8& out, Stream stream) {
  const int64_t tiles = (out.width + TILE - 1) / TILE * ((out.padded + TILE - 1) / TILE);
  tiles_kernel<Source, SCALING><<<static_cast<unsigned>(tiles), THREADS, 0, stream>>>(source, out);
  return launched();
}

template <class Source>
int first_pass(const Source& source, const Fp8& out, Stream stream) {
  // Twice as many vectors in a thread where a block's threads do not suffice; fp32 has no registers for them.
  if (sizeof(typename Source::Type) == 2 && out.width > int64_t{row_threads(4)} * 4 * N)
    return launch_rows<Source, sizeof(typename Source::Type) == 2 ? 8 : 4>(source, out, stream);
  return launch_rows<Source, 4>(source, out, stream);
}

// rowwise and blocks, both copies or one.
template <class Source>
int launch(const Source& source, const Fp8& out, Stream stream) {
  if (out.width == 0) return 0;
  if (out.scaling == Scaling::blocks) {
    if constexpr (Source::NORMALISES) {
      Fp8 rstd_only = out;
      rstd_only.codes = nullptr, rstd_only.peaks = nullptr, rstd_only.padded = out.rows;
      if (out.rows > 0)
        if (const int error = first_pass(source, rstd_only, stream)) return error;
    }
    return launch_tiles<Source, Scaling::blocks>(source, out, stream);
  }
  if (out.peaks != nullptr) {
    const auto error = cudaMemsetAsync(out.peaks, 0, out.width * sizeof(float), stream);
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  if (const int error = first_pass(source, out, stream)) return error;
  return out.codes_t == nullptr ? 0 : launch_tiles<Source, Scaling::rowwise>(source, out, stream);
}

}  // namespace megatune::cuda::fp8
