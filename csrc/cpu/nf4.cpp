#include "isa.h"

#include "megatune/cpu_quant.h"

#define MEGATUNE_KERNEL "nf4.inl"
#include "each_isa.inl"

namespace megatune::cpu {

template <class T>
void nf4_dense(const Nf4Dense<T>& args, int64_t begin, int64_t end) {
  MEGATUNE_DISPATCH(nf4_dense<T>, args, begin, end)
}

template void nf4_dense(const Nf4Dense<float>&, int64_t, int64_t);
template void nf4_dense(const Nf4Dense<bf16>&, int64_t, int64_t);

}  // namespace megatune::cpu
