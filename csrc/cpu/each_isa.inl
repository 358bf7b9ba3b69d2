// Includes MEGATUNE_KERNEL, a kernel's "x.inl", once for each instruction set, after simd.inl; see isa.h.

namespace megatune::cpu {

namespace plain {
#include "simd.inl"
#include MEGATUNE_KERNEL
}  // namespace plain

#if defined(MEGATUNE_X86)
MEGATUNE_TARGET_AVX2
namespace avx2 {
#include "simd.inl"
#include MEGATUNE_KERNEL
}  // namespace avx2
MEGATUNE_TARGET_END

MEGATUNE_TARGET_AVX512
namespace avx512 {
#include "simd.inl"
#include MEGATUNE_KERNEL
}  // namespace avx512
MEGATUNE_TARGET_END
#endif

}  // namespace megatune::cpu
