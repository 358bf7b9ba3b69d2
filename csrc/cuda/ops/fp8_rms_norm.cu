// Root-mean-square norm, to fp8; it is never written in its own type. The formulas of rms_norm.cu.

#include "fp8.cuh"

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

}  // namespace

int fp8_rms_norm(const Fp8RmsNorm& args, Stream stream) {
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
    return fp8::launch(source, args.out, stream);
  });
}

}  // namespace megatune::cuda
