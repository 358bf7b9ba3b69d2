#include "isa.h"

namespace megatune::cpu {

namespace plain {
#include "simd.inl"
#include "rms_norm.inl"
}  // namespace plain

#if defined(MEGATUNE_X86)
MEGATUNE_TARGET_AVX2
namespace avx2 {
#include "simd.inl"
#include "rms_norm.inl"
}  // namespace avx2
MEGATUNE_TARGET_END

MEGATUNE_TARGET_AVX512
namespace avx512 {
#include "simd.inl"
#include "rms_norm.inl"
}  // namespace avx512
MEGATUNE_TARGET_END
#endif

template <class T>
void rms_norm(const RmsNorm<T>& args, int64_t begin, int64_t end) {
  MEGATUNE_DISPATCH(rms_norm<T>, args, begin, end)
}

template <class T>
void rms_norm_backward(const RmsNormBackward<T>& args, int64_t begin, int64_t end) {
  MEGATUNE_DISPATCH(rms_norm_backward<T>, args, begin, end)
}

template void rms_norm(const RmsNorm<float>&, int64_t, int64_t);
template void rms_norm(const RmsNorm<bf16>&, int64_t, int64_t);
template void rms_norm_backward(const RmsNormBackward<float>&, int64_t, int64_t);
template void rms_norm_backward(const RmsNormBackward<bf16>&, int64_t, int64_t);

}  // namespace megatune::cpu
