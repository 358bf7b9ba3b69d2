// The optimizers' CPU kernels as implementations of the ops that megatune/ops/optim.py defines, through torch's stable
// ABI.

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "megatune/codes.h"
#include "megatune/cpu_optim.h"
#include "optim_lists.h"

namespace megatune::bind {
namespace {

constexpr int64_t GRAIN = 16384;            // elements that are worth a thread of their own
constexpr int64_t BEYOND_CACHES = 1 << 22;  // elements: 64 MiB of masters, moments and gradients

int64_t elements(const Tensors& masters) {
  int64_t sum = 0;
  for (const Tensor& master : masters) sum += master.numel();
  return sum;
}

// Shares out all tensors, in units of `each` elements: run(tensor, first unit, last unit).
template <class Run>
void parallel(const Tensors& masters, int64_t each, Run&& run) {
  const size_t count = masters.size();
  std::vector<int64_t> starts(count + 1, 0);
  for (size_t i = 0; i < count; ++i) starts[i + 1] = starts[i] + (masters[i].numel() + each - 1) / each;
  torch::stable::parallel_for(0, starts[count], GRAIN / each, [&](int64_t first, int64_t last) {
    const auto after = std::upper_bound(starts.begin(), starts.end(), first);
    for (size_t i = static_cast<size_t>(after - starts.begin()) - 1; i < count && starts[i] < last; ++i)
      run(i, std::max(first, starts[i]) - starts[i], std::min(last, starts[i + 1]) - starts[i]);
  });
}

// Calls body(null pointer of the gradient's type, null pointer of the weight's type).
template <class Body>
void with_types(const Tensor& grad, const Tensor& weight, Body&& body) {
  float* const single = nullptr;
  cpu::bf16* const low = nullptr;
  if (is_low(grad)) {
    is_low(weight) ? body(low, low) : body(low, single);
  } else {
    is_low(weight) ? body(single, low) : body(single, single);
  }
}

template <class T>
using element = std::remove_pointer_t<std::remove_const_t<T>>;

// Without `keep`, which is each tensor's.
cpu::AdamWStep adamw_step(const Tensor& scale, double lr, double beta1, double beta2, double eps, int64_t number,
                          bool stream) {
  return {*floats(scale),
          1.0f,
          static_cast<float>(beta1),
          static_cast<float>(1.0 - beta1),
          static_cast<float>(beta2),
          static_cast<float>(1.0 - beta2),
          static_cast<float>(eps),
          step_size(lr, beta1, number),
          root_factor(beta2, number),
          stream};
}

void adamw(Tensors masters, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors grads, Tensors weights, Tensor scale,
           std::vector<double> decays, double lr, double beta1, double beta2, double eps, int64_t number) {
  const Lists lists("adamw_", masters, scale, decays);
  for (const Tensors* list : {&masters, &exp_avgs, &exp_avg_sqs}) lists.states(*list, ScalarType::Float, STATE);
  lists.values(grads, false);
  lists.values(weights, true);
  const bool stream = elements(masters) > BEYOND_CACHES;
  const cpu::AdamWStep common = adamw_step(scale, lr, beta1, beta2, eps, number, stream);
  parallel(masters, 1, [&](size_t i, int64_t begin, int64_t end) {
    cpu::AdamWStep step = common;
    step.keep = kept(lr, decays[i]);
    with_types(grads[i], weights[i], [&](auto* grad, auto* weight) {
      using G = element<decltype(grad)>;
      using W = element<decltype(weight)>;
      const cpu::AdamW<G, W> args{pointer<float>(masters[i]), pointer<float>(exp_avgs[i]),
                                  pointer<float>(exp_avg_sqs[i]), static_cast<const G*>(grads[i].const_data_ptr()),
                                  pointer<W>(weights[i]), step};
      cpu::adamw(args, begin, end);
    });
  });
}

void adamw_bf16(Tensors masters, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors grads, Tensor scale,
                std::vector<double> decays, std::vector<int64_t> keys, std::vector<int64_t> firsts,
                std::vector<int64_t> widths, std::vector<int64_t> strides, double lr, double beta1, double beta2,
                double eps, int64_t number) {
  const Lists lists("adamw_bf16_", masters, scale, decays);
  lists.states(masters, ScalarType::BFloat16, "masters must be contiguous bfloat16");
  for (const Tensors* list : {&exp_avgs, &exp_avg_sqs}) lists.states(*list, ScalarType::Float, STATE);
  lists.values(grads, false);
  for (const std::vector<int64_t>* list : {&keys, &firsts, &widths, &strides}) lists.as_long(*list);
  for (int64_t first : firsts) lists.check(first >= 0, "firsts must not be negative");
  for (int64_t width : widths) lists.check(width > 0, "widths must be positive");
  const cpu::AdamWStep common = adamw_step(scale, lr, beta1, beta2, eps, number, false);
  parallel(masters, 1, [&](size_t i, int64_t begin, int64_t end) {
    cpu::AdamWStep step = common;
    step.keep = kept(lr, decays[i]);
    with_types(grads[i], grads[i], [&](auto* grad, auto*) {
      using G = element<decltype(grad)>;
      const cpu::AdamWBf16<G> args{pointer<cpu::bf16>(masters[i]),
                                   pointer<float>(exp_avgs[i]),
                                   pointer<float>(exp_avg_sqs[i]),
                                   static_cast<const G*>(grads[i].const_data_ptr()),
                                   firsts[i],
                                   widths[i],
                                   strides[i],
                                   static_cast<uint64_t>(keys[i]),
                                   static_cast<uint64_t>(number),
                                   step};
      cpu::adamw_bf16(args, begin, end);
    });
  });
}

void adamw_8bit(Tensors masters, Tensors exp_avg_codes, Tensors exp_avg_scales, Tensors exp_avg_sq_codes,
                Tensors exp_avg_sq_scales, Tensors grads, Tensors weights, Tensor scale, std::vector<double> decays,
                double lr, double beta1, double beta2, double eps, int64_t number) {
  const Lists lists("adamw_8bit_", masters, scale, decays);
  lists.states(masters, ScalarType::Float, STATE);
  for (const Tensors* list : {&exp_avg_codes, &exp_avg_sq_codes})
    lists.states(*list, ScalarType::Byte, "codes must be contiguous uint8");
  for (const Tensors* list : {&exp_avg_scales, &exp_avg_sq_scales})
    lists.states(*list, ScalarType::Float, "scales must be contiguous float32", codes::BLOCK);
  lists.values(grads, false);
  lists.values(weights, true);
  const cpu::AdamWStep common = adamw_step(scale, lr, beta1, beta2, eps, number, false);
  parallel(masters, codes::BLOCK, [&](size_t i, int64_t begin, int64_t end) {
    cpu::AdamWStep step = common;
    step.keep = kept(lr, decays[i]);
    with_types(grads[i], weights[i], [&](auto* grad, auto* weight) {
      using G = element<decltype(grad)>;
      using W = element<decltype(weight)>;
      const cpu::AdamW8bit<G, W> args{pointer<float>(masters[i]),
                                      pointer<uint8_t>(exp_avg_codes[i]),
                                      pointer<float>(exp_avg_scales[i]),
                                      pointer<uint8_t>(exp_avg_sq_codes[i]),
                                      pointer<float>(exp_avg_sq_scales[i]),
                                      static_cast<const G*>(grads[i].const_data_ptr()),
                                      pointer<W>(weights[i]),
                                      masters[i].numel(),
                                      step};
      cpu::adamw_8bit(args, begin, end);
    });
  });
}

void lion(Tensors masters, Tensors exp_avgs, Tensors grads, Tensors weights, Tensor scale, std::vector<double> decays,
          double lr, double beta1, double beta2) {
  const Lists lists("lion_", masters, scale, decays);
  for (const Tensors* list : {&masters, &exp_avgs}) lists.states(*list, ScalarType::Float, STATE);
  lists.values(grads, false);
  lists.values(weights, true);
  parallel(masters, 1, [&](size_t i, int64_t begin, int64_t end) {
    with_types(grads[i], weights[i], [&](auto* grad, auto* weight) {
      using G = element<decltype(grad)>;
      using W = element<decltype(weight)>;
      const cpu::Lion<G, W> args{pointer<float>(masters[i]),
                                 pointer<float>(exp_avgs[i]),
                                 static_cast<const G*>(grads[i].const_data_ptr()),
                                 pointer<W>(weights[i]),
                                 *floats(scale),
                                 kept(lr, decays[i]),
                                 static_cast<float>(beta1),
                                 static_cast<float>(1.0 - beta1),
                                 static_cast<float>(beta2),
                                 static_cast<float>(1.0 - beta2),
                                 static_cast<float>(lr)};
      cpu::lion(args, begin, end);
    });
  });
}

// Pieces of the same size whatever the number of threads, added up in order: the sum does not depend on it.
constexpr int64_t PIECE = 1 << 16;

Tensor square_sum(std::vector<Tensor> tensors) {
  std::vector<int64_t> starts(1, 0);  // the first piece of each tensor
  for (const Tensor& one : tensors) {
    const ScalarType type = one.scalar_type();
    STD_TORCH_CHECK(one.is_contiguous() && (type == ScalarType::Float || type == ScalarType::BFloat16),
                    "megatune::square_sum: tensors must be contiguous float32 or bfloat16");
    starts.push_back(starts.back() + (one.numel() + PIECE - 1) / PIECE);
  }
  std::vector<double> sums(starts.back());
  torch::stable::parallel_for(0, starts.back(), 1, [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; ++piece) {
      const size_t i = std::upper_bound(starts.begin(), starts.end(), piece) - starts.begin() - 1;
      const int64_t begin = (piece - starts[i]) * PIECE, length = std::min(PIECE, tensors[i].numel() - begin);
      const void* data = tensors[i].const_data_ptr();
      sums[piece] = tensors[i].scalar_type() == ScalarType::Float
                        ? cpu::square_sum(static_cast<const float*>(data) + begin, length)
                        : cpu::square_sum(static_cast<const cpu::bf16*>(data) + begin, length);
    }
  });
  Tensor result = torch::stable::new_empty(tensors[0], {2}, ScalarType::Double);
  double* out = static_cast<double*>(result.mutable_data_ptr());
  out[0] = std::accumulate(sums.begin(), sums.end(), 0.0);
  out[1] = std::isfinite(out[0]) ? 0.0 : 1.0;
  return result;
}

}  // namespace
}  // namespace megatune::bind

STABLE_TORCH_LIBRARY_IMPL(megatune, CPU, m) {
  m.impl("adamw_", TORCH_BOX(&megatune::bind::adamw));
  m.impl("square_sum", TORCH_BOX(&megatune::bind::square_sum));
  m.impl("adamw_bf16_", TORCH_BOX(&megatune::bind::adamw_bf16));
  m.impl("adamw_8bit_", TORCH_BOX(&megatune::bind::adamw_8bit));
  m.impl("lion_", TORCH_BOX(&megatune::bind::lion));
}
