#include "isa.h"

#include "megatune/cpu_optim.h"
#include "megatune/philox.h"

// No fused multiply-add: the same result on every instruction set, in vectors and in what is left over.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#define MEGATUNE_KERNEL "adamw_bf16.inl"
#include "each_isa.inl"

namespace megatune::cpu {

template <class G>
void adamw_bf16(const AdamWBf16<G>& args, int64_t begin, int64_t end) {
  MEGATUNE_DISPATCH(adamw_bf16, args, begin, end)
}

template void adamw_bf16(const AdamWBf16<float>&, int64_t, int64_t);
template void adamw_bf16(const AdamWBf16<bf16>&, int64_t, int64_t);

}  // namespace megatune::cpu
