#include "isa.h"

#define MEGATUNE_KERNEL "rope.inl"
#include "each_isa.inl"

namespace megatune::cpu {

template <class T>
void rope(const Rope<T>& args, int64_t begin, int64_t end) {
  MEGATUNE_DISPATCH(rope<T>, args, begin, end)
}

template void rope(const Rope<float>&, int64_t, int64_t);
template void rope(const Rope<bf16>&, int64_t, int64_t);

}  // namespace megatune::cpu
