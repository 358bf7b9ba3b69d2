#include "isa.h"

namespace megatune::cpu {

namespace plain {
#include "simd.inl"
#include "glu.inl"
}  // namespace plain

#if defined(MEGATUNE_X86)
MEGATUNE_TARGET_AVX2
namespace avx2 {
#include "simd.inl"
#include "glu.inl"
}  // namespace avx2
MEGATUNE_TARGET_END

MEGATUNE_TARGET_AVX512
namespace avx512 {
#include "simd.inl"
#include "glu.inl"
}  // namespace avx512
MEGATUNE_TARGET_END
#endif

template <class T>
void glu(const Glu<T>& args, int64_t begin, int64_t end) {
  MEGATUNE_DISPATCH(glu<T>, args, begin, end)
}

template <class T>
void glu_backward(const GluBackward<T>& args, int64_t begin, int64_t end) {
  MEGATUNE_DISPATCH(glu_backward<T>, args, begin, end)
}

template void glu(const Glu<float>&, int64_t, int64_t);
template void glu(const Glu<bf16>&, int64_t, int64_t);
template void glu_backward(const GluBackward<float>&, int64_t, int64_t);
template void glu_backward(const GluBackward<bf16>&, int64_t, int64_t);

}  // namespace megatune::cpu
