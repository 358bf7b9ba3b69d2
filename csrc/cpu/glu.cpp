#include "isa.h"

#define MEGATUNE_KERNEL "glu.inl"
#include "each_isa.inl"

namespace megatune::cpu {

template <class T>
void glu(const Glu<T>& args, int64_t begin, int64_t end) {
  MEGATUNE_DISPATCH(glu<T>, args, begin, end)
}

template <class T>
void glu_backward(const GluBackward<T>& args, int64_t begin, int64_t end) {
  MEGATUNE_DISPATCH(glu_backward<T>, args, begin, end)
}

template void glu(const Glu<float>&, int64_t, int64_t);
template void glu(const Glu<bf16>&, int64_t, int64_t);
template void glu_backward(const GluBackward<float>&, int64_t, int64_t);
template void glu_backward(const GluBackward<bf16>&, int64_t, int64_t);

}  // namespace megatune::cpu
