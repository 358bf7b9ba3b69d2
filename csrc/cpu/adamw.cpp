#include "isa.h"

#if defined(MEGATUNE_X86)
#include <emmintrin.h>
#endif

#include "megatune/cpu_optim.h"

// No fused multiply-add: the same result on every instruction set, in vectors and in what is left over.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#define MEGATUNE_KERNEL "adamw.inl"
#include "each_isa.inl"

namespace megatune::cpu {

template <class G, class W>
void adamw(const AdamW<G, W>& args, int64_t begin, int64_t end) {
  const auto run = [&] { MEGATUNE_DISPATCH(adamw, args, begin, end) };
  run();
#if defined(MEGATUNE_X86)
  if (args.step.stream) _mm_sfence();
#endif
}

template void adamw(const AdamW<float, float>&, int64_t, int64_t);
template void adamw(const AdamW<float, bf16>&, int64_t, int64_t);
template void adamw(const AdamW<bf16, float>&, int64_t, int64_t);
template void adamw(const AdamW<bf16, bf16>&, int64_t, int64_t);

}  // namespace megatune::cpu
