// The optimizers' CPU kernels as implementations of the ops that megatune/optim defines, through torch's stable ABI.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "megatune/cpu_optim.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace cpu = megatune::cpu;

namespace {

constexpr int64_t GRAIN = 16384;            // elements that are worth a thread of their own
constexpr int64_t BEYOND_CACHES = 1 << 22;  // elements: 64 MiB of masters, moments and gradients

void check(bool good, const char* what) { STD_TORCH_CHECK(good, "megatune::adamw_: ", what); }

struct Step {
  double lr, beta1, beta2, eps;
  int64_t number;
  float scale;
  bool stream;
};

template <class G, class W>
void update(const Step& step, double decay, const Tensor& master, const Tensor& exp_avg, const Tensor& exp_avg_sq,
            const Tensor& grad, void* weight, int64_t begin, int64_t end) {
  const double number = static_cast<double>(step.number);
  const cpu::AdamW<G, W> args{
      static_cast<float*>(master.mutable_data_ptr()),
      static_cast<float*>(exp_avg.mutable_data_ptr()),
      static_cast<float*>(exp_avg_sq.mutable_data_ptr()),
      static_cast<const G*>(grad.const_data_ptr()),
      static_cast<W*>(weight),
      step.scale,
      static_cast<float>(1.0 - step.lr * decay),
      static_cast<float>(step.beta1),
      static_cast<float>(1.0 - step.beta1),
      static_cast<float>(step.beta2),
      static_cast<float>(1.0 - step.beta2),
      static_cast<float>(step.eps),
      static_cast<float>(step.lr / (1.0 - std::pow(step.beta1, number))),
      static_cast<float>(std::sqrt(1.0 - std::pow(step.beta2, number))),
      step.stream,
  };
  cpu::adamw(args, begin, end);
}

void check_tensors(const Tensor& master, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& grad,
                   const Tensor& weight) {
  for (const Tensor* one : {&master, &exp_avg, &exp_avg_sq}) {
    check(one->scalar_type() == ScalarType::Float, "masters and moments must be float32");
    check(one->is_contiguous() && one->numel() == master.numel(), "masters and moments must be contiguous and alike");
  }
  for (const Tensor* one : {&grad, &weight}) {
    const ScalarType type = one->scalar_type();
    check(type == ScalarType::Float || type == ScalarType::BFloat16, "grads and weights must be float32 or bfloat16");
    check(one->is_contiguous(), "grads and weights must be contiguous");
  }
  check(grad.numel() == master.numel(), "each grad must be as large as its master");
  check(weight.numel() == master.numel() || weight.numel() == 0, "each weight must be as large as its master, or empty");
}

void adamw(std::vector<Tensor> masters, std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
           std::vector<Tensor> grads, std::vector<Tensor> weights, Tensor scale, std::vector<double> decays, double lr,
           double beta1, double beta2, double eps, int64_t number) {
  const size_t count = masters.size();
  check(exp_avgs.size() == count && exp_avg_sqs.size() == count && grads.size() == count && weights.size() == count &&
            decays.size() == count,
        "the lists must be equally long");
  check(scale.numel() == 1 && scale.scalar_type() == ScalarType::Float, "scale must be one float32");
  std::vector<int64_t> starts(count + 1, 0);
  for (size_t i = 0; i < count; ++i) {
    check_tensors(masters[i], exp_avgs[i], exp_avg_sqs[i], grads[i], weights[i]);
    starts[i + 1] = starts[i] + masters[i].numel();
  }
  const float factor = *static_cast<const float*>(scale.const_data_ptr());
  const Step step{lr, beta1, beta2, eps, number, factor, starts[count] > BEYOND_CACHES};
  torch::stable::parallel_for(0, starts[count], GRAIN, [&](int64_t first, int64_t last) {
    const auto after = std::upper_bound(starts.begin(), starts.end(), first);
    for (size_t i = static_cast<size_t>(after - starts.begin()) - 1; i < count && starts[i] < last; ++i) {
      const int64_t begin = std::max(first, starts[i]) - starts[i];
      const int64_t end = std::min(last, starts[i + 1]) - starts[i];
      const bool low_grad = grads[i].scalar_type() == ScalarType::BFloat16;
      const bool low_weight = weights[i].scalar_type() == ScalarType::BFloat16;
      void* weight = weights[i].numel() == 0 ? nullptr : weights[i].mutable_data_ptr();
      const auto run = low_grad ? (low_weight ? &update<cpu::bf16, cpu::bf16> : &update<cpu::bf16, float>)
                                : (low_weight ? &update<float, cpu::bf16> : &update<float, float>);
      run(step, decays[i], masters[i], exp_avgs[i], exp_avg_sqs[i], grads[i], weight, begin, end);
    }
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

STABLE_TORCH_LIBRARY_IMPL(megatune, CPU, m) {
  m.impl("adamw_", TORCH_BOX(&adamw));
  m.impl("square_sum", TORCH_BOX(&square_sum));
}
