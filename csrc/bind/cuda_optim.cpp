// The optimizers' CUDA kernels as implementations of the ops that megatune/ops/optim.py defines.

#include "cuda.h"
#include "megatune/codes.h"
#include "megatune/cuda_optim.h"
#include "optim_lists.h"

namespace megatune::bind {
namespace {

cuda::AdamWStep adamw_step(const Tensor& scale, double lr, double beta1, double beta2, double eps, int64_t number) {
  return {floats(scale),
          static_cast<float>(beta1),
          static_cast<float>(1.0 - beta1),
          static_cast<float>(beta2),
          static_cast<float>(1.0 - beta2),
          static_cast<float>(eps),
          step_size(lr, beta1, number),
          root_factor(beta2, number)};
}

void adamw(Tensors masters, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors grads, Tensors weights, Tensor scale,
           std::vector<double> decays, double lr, double beta1, double beta2, double eps, int64_t number) {
  const char* op = "adamw_";
  const Lists lists(op, masters, scale, decays);
  for (const Tensors* list : {&masters, &exp_avgs, &exp_avg_sqs}) lists.states(*list, ScalarType::Float, STATE);
  lists.values(grads, false);
  lists.values(weights, true);
  std::vector<cuda::AdamWTensor> tensors;
  tensors.reserve(masters.size());
  for (size_t i = 0; i < masters.size(); ++i)
    tensors.push_back({pointer<float>(masters[i]), pointer<float>(exp_avgs[i]), pointer<float>(exp_avg_sqs[i]),
                       grads[i].const_data_ptr(), pointer<void>(weights[i]), masters[i].numel(), kept(lr, decays[i]),
                       is_low(grads[i]), is_low(weights[i])});
  if (tensors.empty()) return;
  const OnDeviceOf device(scale);
  const cuda::AdamWStep step = adamw_step(scale, lr, beta1, beta2, eps, number);
  check_launch(cuda::adamw(tensors.data(), static_cast<int64_t>(tensors.size()), step, device.stream()), op);
}

void adamw_bf16(Tensors masters, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors grads, Tensor scale,
               std::vector<double> decays, std::vector<int64_t> keys, std::vector<int64_t> firsts,
                std::vector<int64_t> widths, std::vector<int64_t> strides, double lr, double beta1, double beta2,
                double eps, int64_t number) {
  const char* op = "adamw_bf16_";
  const Lists lists(op, masters, scale, decays);
  lists.states(masters, ScalarType::BFloat16, "masters must be contiguous bfloat16");
  for (const Tensors* list : {&exp_avgs, &exp_avg_sqs}) lists.states(*list, ScalarType::Float, STATE);
  lists.values(grads, false);
  for (const std::vector<int64_t>* list : {&keys, &firsts, &widths, &strides}) lists.as_long(*list);
  std::vector<cuda::AdamWBf16Tensor> tensors;
  tensors.reserve(masters.size());
  for (size_t i = 0; i < masters.size(); ++i) {
    lists.check(firsts[i] >= 0, "firsts must not be negative");
    lists.check(widths[i] > 0, "widths must be positive");
    lists.check(widths[i] >= masters[i].numel() || masters[i].numel() < int64_t{1} << 32,
                "tensors of many rows must have fewer than 2^32 elements");
    tensors.push_back({pointer<void>(masters[i]), pointer<float>(exp_avgs[i]), pointer<float>(exp_avg_sqs[i]),
                       grads[i].const_data_ptr(), masters[i].numel(), firsts[i], widths[i], strides[i],
                       static_cast<uint64_t>(keys[i]), kept(lr, decays[i]), is_low(grads[i])});
  }
  if (tensors.empty()) return;
  const OnDeviceOf device(scale);
  const cuda::AdamWStep step = adamw_step(scale, lr, beta1, beta2, eps, number);
  check_launch(cuda::adamw_bf16(tensors.data(), static_cast<int64_t>(tensors.size()), step,
                               static_cast<uint64_t>(number), device.stream()),
               op);
}

void adamw_8bit(Tensors masters, Tensors exp_avg_codes, Tensors exp_avg_scales, Tensors exp_avg_sq_codes,
                Tensors exp_avg_sq_scales, Tensors grads, Tensors weights, Tensor scale, std::vector<double> decays,
                double lr, double beta1, double beta2, double eps, int64_t number) {
  const char* op = "adamw_8bit_";
  const Lists lists(op, masters, scale, decays);
  lists.states(masters, ScalarType::Float, STATE);
  for (const Tensors* list : {&exp_avg_codes, &exp_avg_sq_codes})
    lists.states(*list, ScalarType::Byte, "codes must be contiguous uint8");
  for (const Tensors* list : {&exp_avg_scales, &exp_avg_sq_scales})
    lists.states(*list, ScalarType::Float, "scales must be contiguous float32", codes::BLOCK);
  lists.values(grads, false);
  lists.values(weights, true);
  std::vector<cuda::AdamW8bitTensor> tensors;
  tensors.reserve(masters.size());
  for (size_t i = 0; i < masters.size(); ++i)
    tensors.push_back({pointer<float>(masters[i]), pointer<uint8_t>(exp_avg_codes[i]),
                       pointer<float>(exp_avg_scales[i]), pointer<uint8_t>(exp_avg_sq_codes[i]),
                       pointer<float>(exp_avg_sq_scales[i]), grads[i].const_data_ptr(), pointer<void>(weights[i]),
                       masters[i].numel(), kept(lr, decays[i]), is_low(grads[i]), is_low(weights[i])});
  if (tensors.empty()) return;
  const OnDeviceOf device(scale);
  const cuda::AdamWStep step = adamw_step(scale, lr, beta1, beta2, eps, number);
  check_launch(cuda::adamw_8bit(tensors.data(), static_cast<int64_t>(tensors.size()), step, device.stream()), op);
}

void lion(Tensors masters, Tensors exp_avgs, Tensors grads, Tensors weights, Tensor scale, std::vector<double> decays,
          double lr, double beta1, double beta2) {
  const char* op = "lion_";
  const Lists lists(op, masters, scale, decays);
  for (const Tensors* list : {&masters, &exp_avgs}) lists.states(*list, ScalarType::Float, STATE);
  lists.values(grads, false);
  lists.values(weights, true);
  std::vector<cuda::LionTensor> tensors;
  tensors.reserve(masters.size());
  for (size_t i = 0; i < masters.size(); ++i)
    tensors.push_back({pointer<float>(masters[i]), pointer<float>(exp_avgs[i]), grads[i].const_data_ptr(),
                       pointer<void>(weights[i]), masters[i].numel(), kept(lr, decays[i]), is_low(grads[i]),
                       is_low(weights[i])});
  if (tensors.empty()) return;
  const OnDeviceOf device(scale);
  const cuda::LionStep step{floats(scale),
                            static_cast<float>(beta1),
                            static_cast<float>(1.0 - beta1),
                            static_cast<float>(beta2),
                            static_cast<float>(1.0 - beta2),
                            static_cast<float>(lr)};
  check_launch(cuda::lion(tensors.data(), static_cast<int64_t>(tensors.size()), step, device.stream()), op);
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
  m.impl("adamw_bf16_", TORCH_BOX(&megatune::bind::adamw_bf16));
  m.impl("adamw_8bit_", TORCH_BOX(&megatune::bind::adamw_8bit));
  m.impl("lion_", TORCH_BOX(&megatune::bind::lion));
  m.impl("square_sum", TORCH_BOX(&megatune::bind::square_sum));
}
