#include "isa.h"

namespace megatune::cpu {

namespace plain {
#include "simd.inl"
#include "cross_entropy.inl"
}  // namespace plain

#if defined(MEGATUNE_X86)
MEGATUNE_TARGET_AVX2
namespace avx2 {
#include "simd.inl"
#include "cross_entropy.inl"
}  // namespace avx2
MEGATUNE_TARGET_END

MEGATUNE_TARGET_AVX512
namespace avx512 {
#include "simd.inl"
#include "cross_entropy.inl"
}  // namespace avx512
MEGATUNE_TARGET_END
#endif

template <class T>
void cross_entropy(const CrossEntropy<T>& args, int64_t begin, int64_t end) {
  MEGATUNE_DISPATCH(cross_entropy<T>, args, begin, end)
}

template void cross_entropy(const CrossEntropy<float>&, int64_t, int64_t);
template void cross_entropy(const CrossEntropy<bf16>&, int64_t, int64_t);

}  // namespace megatune::cpu
