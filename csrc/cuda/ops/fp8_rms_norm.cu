// Root-mean-square norm, to fp8; it is never written in its own type. The formulas of rms_norm.cu.
//
// One row-wise copy takes one pass, and so do large ones in blocks on sm_90. Of others the rows' rstd comes first, and
// what follows is quantised as it is read.

#include "fp8_norm_cluster.cuh"

namespace megatune::cuda {

namespace {

template <class T>
struct Normed {
  using Type = T;
  static constexpr bool NORMALISES = true, COMPUTES = true;
  using Columns = Vec<float, 8>;

  const T* x;
  int64_t row_stride;
  bool vectors;
  const void* weight;
  megatune::cuda::Type weight_type;
  bool weight_vectors;
  float offset, eps;
  bool round_first;
  float* rstd;

  __device__ Columns columns(int64_t column) const {
    if (weight_vectors) return load_any<8>(weight, weight_type, column);
    Columns values;
#pragma unroll
    for (int i = 0; i < 8; ++i) values.at[i] = load_any<1>(weight, weight_type, column + i).at[0];
    return values;
  }
  __device__ Vec<T, 8> raw(int64_t row, int64_t column) const {
    return fp8::load_values(x + row * row_stride + column, vectors);
  }
  __device__ float rstd_of(float squares, int64_t width) const {
    return rsqrtf(squares / static_cast<float>(width) + eps);
  }
  __device__ Vec<T, 8> finish(const Vec<T, 8>& values, float of_row, const Columns& weights) const {
    Vec<T, 8> y;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float value = to_float(values.at[i]) * of_row;
      if (round_first) value = to_float(from_float<T>(value));
      y.at[i] = from_float<T>(value * (offset + weights.at[i]));
    }
    return y;
  }
};

// With rstd known, for fp8_tiles.cuh. PLAIN: the weight is of type T, without an offset, so that the second product is
// one of two 16 bit numbers, rounded once.
template <class T, bool PLAIN>
struct KnownTiles : Normed<T> {
  static constexpr int PIECES = 1, BLOCKS = 2;
  struct Rows {
    float rstd[fp8::N];
  };
  using Columns = std::conditional_t<PLAIN, uint4, Vec<float, 8>>;

  __device__ Columns columns(int64_t column) const {
    if constexpr (PLAIN) {
      return *reinterpret_cast<const uint4*>(static_cast<const T*>(this->weight) + column);
    } else {
      auto factors = Normed<T>::columns(column);
#pragma unroll
      for (int i = 0; i < fp8::N; ++i) factors.at[i] += this->offset;
      return factors;
    }
  }
  __device__ Rows rows(int64_t row, int64_t count) const {
    Rows of;
#pragma unroll
    for (int i = 0; i < fp8::N; ++i) of.rstd[i] = row + i < count ? this->rstd[row + i] : 0.0f;
    return of;
  }
  __device__ const T* from(int64_t row, int64_t column) const { return this->x + row * this->row_stride + column; }
  __device__ void finish(const uint4 (&pieces)[1], const Rows& rows, int i, const Columns& columns,
                         uint32_t (&y)[4]) const {
    using P = fp8::Pair<T>;
    const uint32_t words[4] = {pieces[0].x, pieces[0].y, pieces[0].z, pieces[0].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float2 two = P::wide(words[j]);
      two.x *= rows.rstd[i], two.y *= rows.rstd[i];
      if constexpr (PLAIN) {
        const uint32_t factors[4] = {columns.x, columns.y, columns.z, columns.w};
        y[j] = P::product(P::narrow(two.x, two.y), factors[j]);
      } else {
        if (this->round_first) two = P::wide(P::narrow(two.x, two.y));
        y[j] = P::narrow(two.x * columns.at[2 * j], two.y * columns.at[2 * j + 1]);
      }
    }
  }
};

// A warp for a row; what it asks for at once keeps memory busy.
constexpr int ROW_THREADS = 256, ROW_LOADS = 8;
template <class T>
__global__ void __launch_bounds__(ROW_THREADS) rstd_kernel(const Normed<T> source, int64_t rows, int64_t width) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * ROW_THREADS + threadIdx.x) / 32;
  if (row >= rows) return;
  const int lane = threadIdx.x % 32, vectors = static_cast<int>(width / fp8::N);
  float total = 0.0f;
  for (int first = lane; first < vectors; first += 32 * ROW_LOADS) {
    Vec<T, 8> values[ROW_LOADS];
#pragma unroll
    for (int i = 0; i < ROW_LOADS; ++i) {
      const int at = first + 32 * i;
      values[i] = at < vectors ? source.raw(row, int64_t{at} * fp8::N) : fp8::zeros<T>();
    }
#pragma unroll
    for (int i = 0; i < ROW_LOADS; ++i) {
      const auto wide = widen(values[i]);
#pragma unroll
      for (int j = 0; j < fp8::N; ++j) total += wide.at[j] * wide.at[j];
    }
  }
#pragma unroll
  for (int other = 16; other > 0; other /= 2) total += __shfl_xor_sync(0xffffffffu, total, other);
  if (lane == 0) source.rstd[row] = source.rstd_of(total, width);
}

template <class T>
int launch_rstd(const Normed<T>& source, const Fp8& out, Stream stream) {
  if (out.rows == 0) return 0;
  rstd_kernel<<<grid(out.rows, ROW_THREADS / 32), ROW_THREADS, 0, stream>>>(source, out.rows, out.width);
  return launched();
}

template <class Source>
int launch_known_tiles(const Source& source, const Fp8RmsNorm& args, Stream stream) {
  fp8::ClusterLaunch<Source> clusters(args.out);
  if (clusters.clusters > 0) return clusters.launch(source, stream);
  if (args.workspace != nullptr) return fp8::launch_norm_ring(source, args.out, args.workspace, stream);
  if (const int error = launch_rstd<typename Source::Type>(source, args.out, stream)) return error;
  return fp8::launch_computed_tiles(source, args.out, stream);
}

}  // namespace

int64_t fp8_rms_norm_workspace(Type type, const Fp8& out) {
  if (type == Type::f32 || out.scaling != Scaling::blocks) return 0;
  using Tiles = KnownTiles<__nv_bfloat16, true>;
  if (fp8::ClusterLaunch<Tiles>(out).clusters > 0) return 0;
  return fp8::ring_takes<Tiles>(out) ? fp8::RingSums::bytes(out) : 0;
}

int fp8_rms_norm(const Fp8RmsNorm& args, Stream stream) {
  const Fp8& out = args.out;
  if (out.width == 0) return 0;
  return with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Normed<T> source{static_cast<const T*>(args.x),
                           args.row_stride,
                           fp8::in_vectors<T>(args.x, args.row_stride),
                           args.weight,
                           args.weight_type,
                           aligned({args.weight}),
                           args.offset,
                           args.eps,
                           args.round_first,
                           args.rstd};
    if (out.scaling == Scaling::rowwise) return fp8::launch_row_copy(source, out, stream);
    if constexpr (sizeof(T) == 2) {
      if (source.vectors && source.weight_vectors) {
        if (args.weight_type == args.type && args.offset == 0.0f && args.round_first)
          return launch_known_tiles(KnownTiles<T, true>{source}, args, stream);
        return launch_known_tiles(KnownTiles<T, false>{source}, args, stream);
      }
    }
    if (const int error = launch_rstd(source, out, stream)) return error;
    return fp8::launch_tiles<Normed<T>, Scaling::blocks>(source, out, stream);
  });
}

}  // namespace megatune::cuda
