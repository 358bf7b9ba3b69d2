// Gated linear unit on interleaved (gate, up) pairs, to fp8; it is never written in its own type.

#include "../common/activate.cuh"
#include "fp8.cuh"

namespace megatune::cuda {

namespace {

template <class T>
struct Gated {
  using Type = T;
  static constexpr bool NORMALISES = false, COMPUTES = true;
  struct Columns {};

  const T* gate_up;
  int64_t row_stride;
  bool vectors;
  Activation activation;

  __device__ Columns columns(int64_t) const { return {}; }
  __device__ Vec<T, 8> raw(int64_t row, int64_t column) const {
    const T* from = gate_up + row * row_stride + 2 * column;
    const Vec<T, 8> part[2] = {fp8::load_values(from, vectors), fp8::load_values(from + 8, vectors)};
    Vec<T, 8> values;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float gate = to_float(part[i / 4].at[2 * i % 8]), up = to_float(part[i / 4].at[(2 * i + 1) % 8]);
      values.at[i] = from_float<T>(activate<false>(gate, activation).x * up);
    }
    return values;
  }
  __device__ Vec<T, 8> finish(const Vec<T, 8>& values, float, const Columns&) const { return values; }
};

}  // namespace

int fp8_glu(const Fp8Glu& args, Stream stream) {
  return with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Gated<T> source{static_cast<const T*>(args.gate_up), args.row_stride,
                          fp8::in_vectors<T>(args.gate_up, args.row_stride), args.activation};
    return fp8::launch(source, args.out, stream);
  });
}

}  // namespace megatune::cuda
