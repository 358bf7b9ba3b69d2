// Rotary position embedding: the pairs (x[i], x[i + half]) of every query and key turned by the angle of their token.

#include "rope.cuh"

namespace megatune::cuda {

namespace {

constexpr int EACH = 2;  // heads that a thread has on their way

bool in_steps(const Rope& args, int64_t step) {
  const auto fits = [&](int64_t size, int64_t stride) { return size <= 1 || stride % step == 0; };
  return args.half % step == 0 && args.width % step == 0 && fits(args.tokens, args.q_strides[0]) &&
         fits(args.groups, args.q_strides[1]) && fits(args.queries, args.q_strides[2]) &&
         fits(args.tokens, args.k_strides[0]) && fits(args.groups, args.k_strides[1]);
}

}  // namespace

int rope(const Rope& args, Stream stream) {
  const int64_t items = args.tokens * args.groups;
  if (items == 0 || args.width == 0) return 0;
  if (items > UINT32_MAX || args.queries > INT32_MAX - 2) return static_cast<int>(cudaErrorInvalidValue);
  with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    const bool vectors =
        in_steps(args, N) && aligned({args.q, args.k, args.cos, args.sin, args.turned_q, args.turned_k});
    const Parted<T> route = parted<T>(args);
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
