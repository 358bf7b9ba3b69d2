#include "isa.h"

#include "megatune/cpu_optim.h"
#include "megatune/codes.h"

// No fused multiply-add: the same result on every instruction set, in vectors and in what is left over.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#define MEGATUNE_KERNEL "adamw_8bit.inl"
#include "each_isa.inl"

namespace megatune::cpu {

template <class G, class W>
void adamw_8bit(const AdamW8bit<G, W>& args, int64_t begin, int64_t end) {
  MEGATUNE_DISPATCH(adamw_8bit, args, begin, end)
}

template void adamw_8bit(const AdamW8bit<float, float>&, int64_t, int64_t);
template void adamw_8bit(const AdamW8bit<float, bf16>&, int64_t, int64_t);
template void adamw_8bit(const AdamW8bit<bf16, float>&, int64_t, int64_t);
template void adamw_8bit(const AdamW8bit<bf16, bf16>&, int64_t, int64_t);

}  // namespace megatune::cpu
