// Rotary position embedding: the pairs (x[i], x[i + half]) of every head turned by the angle of its token.

#include "rope.cuh"

namespace megatune::cuda {

namespace {

constexpr int EACH = 2;  // heads that a thread has on their way

template <class T>
struct OneTensor {
  const T* x;
  int64_t token_stride, group_stride, head_stride;
  T* y;  // contiguous
  int64_t width;
  uint32_t groups;
  int heads;

  __device__ const T* from(int64_t token, int64_t group, int64_t head) const {
    return x + token * token_stride + group * group_stride + head * head_stride;
  }
  __device__ T* to(int64_t item, int64_t head) const { return y + (item * heads + head) * width; }
  __device__ bool copies(int) const { return false; }
};

}  // namespace

int rope(const Rope& args, Stream stream) {
  const Rows& rows = args.rows;
  const int64_t items = rows.size[0] * rows.size[1];
  if (items == 0 || rows.size[2] == 0 || args.width == 0) return 0;
  if (items > UINT32_MAX || rows.size[2] > INT32_MAX) return static_cast<int>(cudaErrorInvalidValue);
  with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    const bool vectors = args.half % N == 0 && args.width % N == 0 && in_steps(rows, N) &&
                         aligned({args.x, args.cos, args.sin, args.y});
    const OneTensor<T> route{static_cast<const T*>(args.x),
                             rows.stride[0],
                             rows.stride[1],
                             rows.stride[2],
                             static_cast<T*>(args.y),
                             args.width,
                             static_cast<uint32_t>(rows.size[1]),
                             static_cast<int>(rows.size[2])};
    const Angles angles{args.cos, args.sin, args.half, args.inverse ? -1.0f : 1.0f};
    const dim3 block = turn_block(args.half, args.width, route.heads, vectors ? N : 1, EACH);
    const unsigned blocks = grid(items, block.y);
    if (vectors) {
      turn_kernel<T, N, EACH><<<blocks, block, 0, stream>>>(route, angles, items, args.width);
    } else {
      turn_kernel<T, 1, EACH><<<blocks, block, 0, stream>>>(route, angles, items, args.width);
    }
  });
  return launched();
}

}  // namespace megatune::cuda
