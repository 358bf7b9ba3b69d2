// Root-mean-square norm, to fp8 with row-wise scales, as it is and transposed. The formulas of rms_norm.cu.
//
// The first pass has whole rows: their rstd and scales, and the columns' largest magnitudes. A row is shared by as many
// warps as can hold a number of each column's in registers; each lane fetches its own part of the rows to come, so that
// only the two sums over a row are waited for. The second pass is that of fp8_rowwise.cuh.

#include "fp8_rowwise.cuh"

namespace megatune::cuda {

namespace {

using fp8::N;

// Without an offset, so that the second product is one of two 16 bit numbers, rounded once.
template <class T>
struct NormedTiles {
  using Type = T;
  static constexpr bool NORMALISES = true;
  static constexpr int PIECES = 1, BLOCKS = 4;
  struct Rows {
    float rstd;
  };
  using Columns = uint4;

  const T* x;
  int64_t row_stride;
  const T* weight;
  float eps;
  float* rstd;

  __device__ Columns columns(int64_t column) const { return *reinterpret_cast<const uint4*>(weight + column); }
  __device__ const T* from(int64_t row, int64_t column) const { return x + row * row_stride + column; }
  // As the first pass leaves it: see raise_columns.
  __device__ float column_peak(const Fp8& out, int64_t column) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    return to_float(reinterpret_cast<const T*>(out.peaks)[column]);
#else
    return out.peaks[column];
#endif
  }
  __device__ void finish(const uint4 (&pieces)[1], const Rows& row, int, const Columns& columns,
                         uint32_t (&y)[4]) const {
    using P = fp8::Pair<T>;
    const uint32_t words[4] = {pieces[0].x, pieces[0].y, pieces[0].z, pieces[0].w};
    const uint32_t weights[4] = {columns.x, columns.y, columns.z, columns.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float2 two = P::wide(words[j]);
      two.x *= row.rstd, two.y *= row.rstd;
      y[j] = P::product(P::narrow(two.x, two.y), weights[j]);
    }
  }
};

template <class T>
__device__ float squares(const uint4& eight) {
  const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 two = fp8::Pair<T>::wide(words[j]);
    sum += two.x * two.x, sum += two.y * two.y;
  }
  return sum;
}

// Of a row: vectors of a lane. Of a block: warps, and rows of each warp in shared memory (the one at work too).
constexpr int KEPT = 8, MOST_WARPS = 16, STAGES = 2;
constexpr int WARP_BYTES = STAGES * KEPT * 32 * 16;

// Only the warps that share a row; they have a barrier of their own, 0 being that of the block.
__device__ inline void row_barrier(int group, int share) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "r"(share * 32) : "memory");
}

// Zeros for the columns' peaks. What was there before has ended when the first pass begins, these zeros perhaps not.
__global__ void clear_kernel(float* peaks, int64_t width) {
  wait_for_previous();
  let_next_begin();
  const int64_t column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (column < width) peaks[column] = 0.0f;
}

// Raises the columns' peaks to those of a block, of_groups[group, vector]. All blocks do so at the same time: each
// begins elsewhere and, on Hopper, takes eight columns at once, as numbers of T.
template <class T>
__device__ void raise_columns(const uint4* of_groups, int groups, const Fp8& out) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const int vectors = static_cast<int>(out.width / N), begin = blockIdx.x * blockDim.x % vectors;
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    const int at = i + begin < vectors ? i + begin : i + begin - vectors;
    uint4 top = of_groups[at];
    for (int group = 1; group < groups; ++group) {
      const uint4 other = of_groups[group * vectors + at];
      top.x = fp8::larger<T>(top.x, other.x), top.y = fp8::larger<T>(top.y, other.y);
      top.z = fp8::larger<T>(top.z, other.z), top.w = fp8::larger<T>(top.w, other.w);
    }
    T* const to = reinterpret_cast<T*>(out.peaks) + at * N;
    constexpr uint32_t magnitude = 0x7fff7fff;
    top.x &= magnitude, top.y &= magnitude, top.z &= magnitude, top.w &= magnitude;
    if constexpr (std::is_same_v<T, __half>) {
      asm volatile("red.relaxed.gpu.global.max.noftz.v4.f16x2 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(top.x),
                   "r"(top.y), "r"(top.z), "r"(top.w)
                   : "memory");
    } else {
      asm volatile("red.relaxed.gpu.global.max.noftz.v4.bf16x2 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(top.x),
                   "r"(top.y), "r"(top.z), "r"(top.w)
                   : "memory");
    }
  }
#else
  const T* values = reinterpret_cast<const T*>(of_groups);
  for (int column = threadIdx.x; column < out.width; column += blockDim.x) {
    float peak = 0.0f;
    for (int group = 0; group < groups; ++group)
      peak = fmaxf(peak, fabsf(to_float(values[group * static_cast<int>(out.width) + column])));
    fp8::raise(out.peaks + column, peak);
  }
#endif
}

// `share` warps have a row.
template <class Source>
__global__ void __launch_bounds__(MOST_WARPS * 32, 1) norm_rows_kernel(const Source source, const Fp8 out, int share) {
  using T = typename Source::Type;
  __shared__ float sums[2][MOST_WARPS];
  __shared__ uint32_t tops[2][MOST_WARPS];
  extern __shared__ uint4 ring[];  // [warp, stage, KEPT, lane]; in the end peaks T [group, width]
  let_next_begin();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / share, part = warp % share;
  const int groups = blockDim.x / 32 / share, vectors = static_cast<int>(out.width / N);
  const int first = part * (KEPT * 32) + lane;
  const int64_t step = int64_t{gridDim.x} * groups;
  uint4* const mine = ring + warp * (STAGES * KEPT * 32) + lane;
  const auto fetch = [&](int64_t row, int stage) {
#pragma unroll
    for (int v = 0; v < KEPT; ++v) {
      const int at = first + v * 32;
      const bool here = at < vectors && row < out.rows;  // else zeros
      const T* from = source.from(here ? row : 0, here ? int64_t{at} * N : 0);
      const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(mine + (stage * KEPT + v) * 32));
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(here ? 16 : 0)
                   : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");  // empty ones count too
  };
  fp8::Peaks<T> peaks[KEPT];
  if (group < groups) {
    uint4 weights[KEPT];
#pragma unroll
    for (int v = 0; v < KEPT; ++v) {
      weights[v] = uint4{0, 0, 0, 0};
      if (first + v * 32 < vectors) weights[v] = source.columns(int64_t{first + v * 32} * N);
    }
    int64_t row = int64_t{blockIdx.x} * groups + group;
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) fetch(row + stage * step, stage);
    for (int stage = 0, turn = 0; row < out.padded; row += step, turn ^= 1) {
      fetch(row + (STAGES - 1) * step, stage == 0 ? STAGES - 1 : stage - 1);
      asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
      const uint4* const values = mine + stage * KEPT * 32;
      float total = 0.0f;
#pragma unroll
      for (int v = 0; v < KEPT; ++v) total += squares<T>(values[v * 32]);
#pragma unroll
      for (int other = 16; other > 0; other /= 2) total += __shfl_xor_sync(0xffffffffu, total, other);
      if (share > 1) {
        if (lane == 0) sums[turn][warp] = total;
        row_barrier(group, share);
        total = 0.0f;
        for (int i = 0; i < share; ++i) total += sums[turn][group * share + i];
      }
      const typename Source::Rows of_row{rsqrtf(total / static_cast<float>(out.width) + source.eps)};
      uint32_t top = 0;  // two magnitudes of the row
#pragma unroll
      for (int v = 0; v < KEPT; ++v) {
        const uint4 pieces[1] = {values[v * 32]};
        uint32_t y[N / 2];
        source.finish(pieces, of_row, 0, weights[v], y);
#pragma unroll
        for (int j = 0; j < N / 2; ++j) {
          peaks[v].at[j] = fp8::larger<T>(peaks[v].at[j], y[j]);
          top = fp8::larger<T>(top, y[j]);
        }
      }
#pragma unroll
      for (int other = 16; other > 0; other /= 2)
        top = fp8::larger<T>(top, __shfl_xor_sync(0xffffffffu, top, other));
      if (share > 1) {
        if (lane == 0) tops[turn][warp] = top;
        row_barrier(group, share);
        for (int i = 0; i < share; ++i) top = fp8::larger<T>(top, tops[turn][group * share + i]);
      }
      if (part == 0 && lane == 0) {
        const float2 two = fp8::magnitudes<T>(top);
        out.scales[row] = row < out.rows ? fp8::scale_of(fmaxf(two.x, two.y), false) : 1.0f;
        if (row < out.rows) source.rstd[row] = of_row.rstd;
      }
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  if (group < groups) {
#pragma unroll
    for (int v = 0; v < KEPT; ++v) {
      const auto& at = peaks[v].at;
      if (first + v * 32 < vectors) ring[group * vectors + first + v * 32] = uint4{at[0], at[1], at[2], at[3]};
    }
  }
  __syncthreads();
  wait_for_previous();  // for the zeros
  raise_columns<T>(ring, groups, out);
}

// Warps of a block that the device has shared memory for; 0 where it cannot be asked.
int most_warps() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
  return std::min(MOST_WARPS, (bytes - 1024) / WARP_BYTES);
}

int64_t warps_of_row(int64_t width) { return (width + KEPT * 32 * N - 1) / (KEPT * 32 * N); }

template <class Source>
int launch(const Source& source, const Fp8& out, Stream stream) {
  constexpr unsigned threads = 512;
  if (const int error = launch_early(clear_kernel, grid(out.width, threads), threads, 0, stream, out.peaks, out.width))
    return error;
  const auto kernel = norm_rows_kernel<Source>;
  const int share = static_cast<int>(warps_of_row(out.width)), warps = most_warps() / share * share;
  const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, warps * WARP_BYTES);
  if (error != cudaSuccess) return static_cast<int>(error);
  const unsigned blocks = std::min<unsigned>(grid(out.padded, warps / share), multiprocessors());
  if (const int failed = launch_early(kernel, blocks, warps * 32, warps * WARP_BYTES, stream, source, out, share))
    return failed;
  return fp8::launch_scaled_tiles<Source, false>(source, out, stream);
}

}  // namespace

bool fp8_rms_norm_fits(const Fp8RmsNorm& args) {
  return args.type != Type::f32 && args.weight_type == args.type && args.offset == 0.0f && args.round_first &&
         args.out.width > 0 && aligned({args.weight}) && fp8::in_vectors<__half>(args.x, args.row_stride) &&
         warps_of_row(args.out.width) <= most_warps();
}

int fp8_rms_norm_both(const Fp8RmsNorm& args, Stream stream) {
  const auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const NormedTiles<T> source{static_cast<const T*>(args.x), args.row_stride, static_cast<const T*>(args.weight),
                                args.eps, args.rstd};
    return launch(source, args.out, stream);
  };
  return args.type == Type::bf16 ? run(static_cast<__nv_bfloat16*>(nullptr)) : run(static_cast<__half*>(nullptr));
}

}  // namespace megatune::cuda
