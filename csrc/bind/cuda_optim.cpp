// The optimizers' CUDA kernels as implementations of the ops that megatune/ops/optim.py defines.

#include <cmath>

#include "cuda.h"
#include "megatune/cuda_optim.h"

namespace megatune::bind {
namespace {

constexpr const char* OP = "adamw_";

void check_state(const Tensor& tensor, const Tensor& master) {
  check(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(), OP,
        "masters and moments must be contiguous float32");
  check(tensor.numel() == master.numel(), OP, "moments must be as large as their masters");
}

bool is_low(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16, OP, "grads and weights must be float32 or bfloat16");
  check(tensor.is_contiguous(), OP, "grads and weights must be contiguous");
  return type == ScalarType::BFloat16;
}

void adamw(std::vector<Tensor> masters, std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
           std::vector<Tensor> grads, std::vector<Tensor> weights, Tensor scale, std::vector<double> decays, double lr,
           double beta1, double beta2, double eps, int64_t number) {
  const size_t count = masters.size();
  check(exp_avgs.size() == count && exp_avg_sqs.size() == count && grads.size() == count && weights.size() == count &&
            decays.size() == count,
        OP, "the lists must be equally long");
  check(scale.numel() == 1 && scale.scalar_type() == ScalarType::Float, OP, "scale must be one float32");
  std::vector<cuda::AdamWTensor> tensors;
  tensors.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    for (const Tensor* one : {&masters[i], &exp_avgs[i], &exp_avg_sqs[i]}) check_state(*one, masters[i]);
    check(grads[i].numel() == masters[i].numel(), OP, "each grad must be as large as its master");
    const bool has_weight = weights[i].numel() != 0;
    check(!has_weight || weights[i].numel() == masters[i].numel(), OP, "each weight must be as large as its master");
    tensors.push_back({static_cast<float*>(masters[i].mutable_data_ptr()),
                       static_cast<float*>(exp_avgs[i].mutable_data_ptr()),
                       static_cast<float*>(exp_avg_sqs[i].mutable_data_ptr()), grads[i].const_data_ptr(),
                       has_weight ? weights[i].mutable_data_ptr() : nullptr, masters[i].numel(),
                       static_cast<float>(1.0 - lr * decays[i]), is_low(grads[i]), is_low(weights[i])});
  }
  if (count == 0) return;
  const double steps = static_cast<double>(number);
  const cuda::AdamWStep step{static_cast<const float*>(scale.const_data_ptr()),
                             static_cast<float>(beta1),
                             static_cast<float>(1.0 - beta1),
                             static_cast<float>(beta2),
                             static_cast<float>(1.0 - beta2),
                             static_cast<float>(eps),
                             static_cast<float>(lr / (1.0 - std::pow(beta1, steps))),
                             static_cast<float>(std::sqrt(1.0 - std::pow(beta2, steps)))};
  const OnDeviceOf device(scale);
  check_launch(cuda::adamw(tensors.data(), static_cast<int64_t>(count), step, device.stream()), OP);
}

Tensor square_sum(std::vector<Tensor> tensors) {
  const char* op = "square_sum";
  check(!tensors.empty(), op, "there must be a tensor");
  std::vector<cuda::NormTensor> list;
  list.reserve(tensors.size());
  for (const Tensor& one : tensors) {
    const ScalarType type = one.scalar_type();
    check(type == ScalarType::Float || type == ScalarType::BFloat16, op, "tensors must be float32 or bfloat16");
    check(one.is_contiguous(), op, "tensors must be contiguous");
    list.push_back({one.const_data_ptr(), one.numel(), type == ScalarType::BFloat16});
  }
  const int64_t count = static_cast<int64_t>(list.size());
  const int64_t chunks = cuda::square_sum_chunks(list.data(), count);
  const OnDeviceOf device(tensors[0]);
  Tensor partials = torch::stable::new_empty(tensors[0], {2 * chunks}, ScalarType::Double);
  Tensor out = torch::stable::new_empty(tensors[0], {2}, ScalarType::Double);
  check_launch(cuda::square_sum(list.data(), count, static_cast<double*>(partials.mutable_data_ptr()),
                                static_cast<double*>(out.mutable_data_ptr()), device.stream()),
               op);
  return out;
}

}  // namespace
}  // namespace megatune::bind

STABLE_TORCH_LIBRARY_IMPL(megatune, CUDA, m) {
  m.impl("adamw_", TORCH_BOX(&megatune::bind::adamw));
  m.impl("square_sum", TORCH_BOX(&megatune::bind::square_sum));
}
