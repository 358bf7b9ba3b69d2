#include "isa.h"
#include "megatune/cpu_optim.h"

#define MEGATUNE_KERNEL "square_sum.inl"
#include "each_isa.inl"

namespace megatune::cpu {

template <class T>
double square_sum(const T* x, int64_t length) {
  MEGATUNE_DISPATCH(square_sum, x, length)
}

template double square_sum(const float*, int64_t);
template double square_sum(const bf16*, int64_t);

}  // namespace megatune::cpu
