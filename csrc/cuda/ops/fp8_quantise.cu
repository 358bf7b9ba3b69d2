// A matrix as it is, to fp8.

#include "fp8_rowwise.cuh"

namespace megatune::cuda {

namespace {

// VECTORS: in 16 byte loads. Known when compiled: a branch at each load would have it wait for the one before.
template <class T, bool VECTORS>
struct Plain {
  using Type = T;
  static constexpr bool NORMALISES = false, COMPUTES = false, WHOLE = VECTORS;
  struct Columns {};

  const T* x;
  int64_t row_stride;

  __device__ Columns columns(int64_t) const { return {}; }
  __device__ Vec<T, 8> raw(int64_t row, int64_t column) const {
    return fp8::load_values(x + row * row_stride + column, VECTORS);
  }
  __device__ Vec<T, 8> finish(const Vec<T, 8>& values, float, const Columns&) const { return values; }
};

// The same for fp8_rowwise.cuh.
template <class T>
struct PlainTiles {
  using Type = T;
  static constexpr bool NORMALISES = false;
  static constexpr int PIECES = 1, BLOCKS = 4;
  struct Rows {};
  struct Columns {};

  const T* x;
  int64_t row_stride;

  __device__ Columns columns(int64_t) const { return {}; }
  __device__ const T* from(int64_t row, int64_t column) const { return x + row * row_stride + column; }
  __device__ void finish(const uint4 (&pieces)[1], const Rows&, int, const Columns&, uint32_t (&y)[4]) const {
    y[0] = pieces[0].x, y[1] = pieces[0].y, y[2] = pieces[0].z, y[3] = pieces[0].w;
  }
};

}  // namespace

int fp8_quantise(const Fp8Quantise& args, Stream stream) {
  if (args.out.width == 0) return 0;
  return with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto go = [&](auto vectors) {
      using Source = Plain<T, vectors.value>;
      const Source source{static_cast<const T*>(args.x), args.row_stride};
      const Fp8& out = args.out;
      if (out.scaling == Scaling::blocks) return fp8::launch_tiles<Source, Scaling::blocks>(source, out, stream);
      if (out.scaling == Scaling::mixed) return fp8::launch_tiles<Source, Scaling::mixed>(source, out, stream);
      if (out.scaling == Scaling::tiles) return fp8::launch_tiles<Source, Scaling::tiles>(source, out, stream);
      if constexpr (sizeof(T) == 2 && vectors.value) {
        if (out.codes_t != nullptr) {
          const PlainTiles<T> tiles{source.x, source.row_stride};
          return out.e5m2 ? fp8::launch_panels<PlainTiles<T>, true>(tiles, out, stream)
                          : fp8::launch_panels(tiles, out, stream);
        }
        return out.e5m2 ? fp8::launch_row_copy<Source, true>(source, out, stream)
                        : fp8::launch_row_copy(source, out, stream);
      } else {
        return out.e5m2 ? fp8::launch_rowwise<Source, true>(source, out, stream)
                        : fp8::launch_rowwise(source, out, stream);
      }
    };
    return fp8::in_vectors<T>(args.x, args.row_stride) ? go(std::true_type{}) : go(std::false_type{});
  });
}

}  // namespace megatune::cuda
