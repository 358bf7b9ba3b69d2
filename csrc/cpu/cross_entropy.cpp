#include "isa.h"

#define MEGATUNE_KERNEL "cross_entropy.inl"
#include "each_isa.inl"

namespace megatune::cpu {

template <class T>
void cross_entropy(const CrossEntropy<T>& args, int64_t begin, int64_t end) {
  MEGATUNE_DISPATCH(cross_entropy<T>, args, begin, end)
}

template void cross_entropy(const CrossEntropy<float>&, int64_t, int64_t);
template void cross_entropy(const CrossEntropy<bf16>&, int64_t, int64_t);

}  // namespace megatune::cpu
