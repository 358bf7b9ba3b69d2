#include "isa.h"

#define MEGATUNE_KERNEL "rms_norm.inl"
#include "each_isa.inl"

namespace megatune::cpu {

template <class T>
void rms_norm(const RmsNorm<T>& args, int64_t begin, int64_t end) {
  MEGATUNE_DISPATCH(rms_norm<T>, args, begin, end)
}

template <class T>
void rms_norm_backward(const RmsNormBackward<T>& args, int64_t begin, int64_t end) {
  MEGATUNE_DISPATCH(rms_norm_backward<T>, args, begin, end)
}

template void rms_norm(const RmsNorm<float>&, int64_t, int64_t);
template void rms_norm(const RmsNorm<bf16>&, int64_t, int64_t);
template void rms_norm_backward(const RmsNormBackward<float>&, int64_t, int64_t);
template void rms_norm_backward(const RmsNormBackward<bf16>&, int64_t, int64_t);

}  // namespace megatune::cpu
