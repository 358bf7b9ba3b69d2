#include "isa.h"

#include "megatune/cpu_quant.h"

namespace megatune::cpu {

namespace plain {
#include "simd.inl"
#include "nf4.inl"
}  // namespace plain

#if defined(MEGATUNE_X86)
MEGATUNE_TARGET_AVX2
namespace avx2 {
#include "simd.inl"
#include "nf4.inl"
}  // namespace avx2
MEGATUNE_TARGET_END

MEGATUNE_TARGET_AVX512
namespace avx512 {
#include "simd.inl"
#include "nf4.inl"
}  // namespace avx512
MEGATUNE_TARGET_END
#endif

template <class T>
void nf4_dense(const Nf4Dense<T>& args, int64_t begin, int64_t end) {
  MEGATUNE_DISPATCH(nf4_dense<T>, args, begin, end)
}

template void nf4_dense(const Nf4Dense<float>&, int64_t, int64_t);
template void nf4_dense(const Nf4Dense<bf16>&, int64_t, int64_t);

}  // namespace megatune::cpu
