// Gated linear unit on interleaved (gate, up) pairs, to fp8; it is never written in its own type.

#include "../common/activate.cuh"
#include "fp8_rowwise.cuh"

namespace megatune::cuda {

namespace {

// SILU: it is that activation, else what `activation` says.
template <class T, bool SILU>
struct Gated {
  using Type = T;
  static constexpr bool NORMALISES = false, COMPUTES = true;
  struct Columns {};

  const T* gate_up;
  int64_t row_stride;
  bool vectors;
  Activation activation;

  __device__ Columns columns(int64_t) const { return {}; }
  __device__ float value(float gate, float up) const {
    return activate<false, sizeof(T) == 2>(gate, SILU ? Activation::silu : activation).x * up;
  }
  __device__ Vec<T, 8> raw(int64_t row, int64_t column) const {
    const T* from = gate_up + row * row_stride + 2 * column;
    const Vec<float, 8> part[2] = {widen(fp8::load_values(from, vectors)), widen(fp8::load_values(from + 8, vectors))};
    Vec<float, 8> values;
#pragma unroll
    for (int i = 0; i < 8; ++i) values.at[i] = value(part[i / 4].at[2 * i % 8], part[i / 4].at[(2 * i + 1) % 8]);
    return narrow<T>(values);
  }
  __device__ Vec<T, 8> finish(const Vec<T, 8>& values, float, const Columns&) const { return values; }
};

// The same for fp8_tiles.cuh and fp8_rowwise.cuh.
template <class T, bool SILU>
struct GatedTiles : Gated<T, SILU> {
  static constexpr int PIECES = 2;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int BLOCKS = 2;  // sm_80 needs some registers more
#else
  static constexpr int BLOCKS = std::is_same_v<T, __nv_bfloat16> ? 3 : 2;
#endif
  struct Rows {};
  using Columns = typename Gated<T, SILU>::Columns;

  __device__ Rows rows(int64_t, int64_t) const { return {}; }
  __device__ const T* from(int64_t row, int64_t column) const {
    return this->gate_up + row * this->row_stride + 2 * column;
  }
  __device__ void finish(const uint4 (&pieces)[2], const Rows&, int, const Columns&, uint32_t (&y)[4]) const {
    using P = fp8::Pair<T>;
    const uint32_t words[8] = {pieces[0].x, pieces[0].y, pieces[0].z, pieces[0].w,
                               pieces[1].x, pieces[1].y, pieces[1].z, pieces[1].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 low = P::wide(words[2 * i]), high = P::wide(words[2 * i + 1]);  // (gate, up)
      y[i] = P::narrow(this->value(low.x, low.y), this->value(high.x, high.y));
    }
  }
};

}  // namespace

int fp8_glu(const Fp8Glu& args, Stream stream) {
  if (args.out.width == 0) return 0;
  return with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto go = [&](auto silu) {
      const GatedTiles<T, silu.value> source{{static_cast<const T*>(args.gate_up), args.row_stride,
                                              fp8::in_vectors<T>(args.gate_up, args.row_stride), args.activation}};
      const Gated<T, silu.value>& any = source;
      const bool rowwise = args.out.scaling == Scaling::rowwise;
      if constexpr (sizeof(T) == 2) {
        if (source.vectors && !rowwise) return fp8::launch_computed_tiles(source, args.out, stream);
        if (source.vectors && args.out.codes_t != nullptr) return fp8::launch_panels(source, args.out, stream);
      }
      if (rowwise) return fp8::launch_rowwise(any, args.out, stream);
      return fp8::launch_tiles<Gated<T, silu.value>, Scaling::blocks>(any, args.out, stream);
    };
    return args.activation == Activation::silu ? go(std::true_type{}) : go(std::false_type{});
  });
}

}  // namespace megatune::cuda
