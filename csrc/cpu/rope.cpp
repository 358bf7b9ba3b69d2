#include "isa.h"

namespace megatune::cpu {

namespace plain {
#include "simd.inl"
#include "rope.inl"
}  // namespace plain

#if defined(MEGATUNE_X86)
MEGATUNE_TARGET_AVX2
namespace avx2 {
#include "simd.inl"
#include "rope.inl"
}  // namespace avx2
MEGATUNE_TARGET_END

MEGATUNE_TARGET_AVX512
namespace avx512 {
#include "simd.inl"
#include "rope.inl"
}  // namespace avx512
MEGATUNE_TARGET_END
#endif

template <class T>
void rope(const Rope<T>& args, int64_t begin, int64_t end) {
  MEGATUNE_DISPATCH(rope<T>, args, begin, end)
}

template void rope(const Rope<float>&, int64_t, int64_t);
template void rope(const Rope<bf16>&, int64_t, int64_t);

}  // namespace megatune::cpu
