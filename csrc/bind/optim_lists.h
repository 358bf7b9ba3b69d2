// What the files that bind the optimizers' kernels for CPUs and CUDA share: the tensors of one call, and its numbers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <vector>

namespace megatune::bind {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// All lists as long as `masters`; states contiguous and as large as their masters, gradients and weights (which may be
// empty) in a dtype that kernels know.
class Lists {
 public:
  Lists(const char* op, const Tensors& masters, const Tensor& scale, const std::vector<double>& decays)
      : op_(op), masters_(masters) {
    as_long(decays);
    check(scale.numel() == 1 && scale.scalar_type() == ScalarType::Float, "scale must be one float32");
  }

  void check(bool good, const char* what) const { STD_TORCH_CHECK(good, "megatune::", op_, ": ", what); }

  template <class T>
  void as_long(const std::vector<T>& list) const {
    check(list.size() == masters_.size(), "the lists must be equally long");
  }

  // `each`: elements of the master that have one of the state's.
  void states(const Tensors& list, ScalarType type, const char* what, int64_t each = 1) const {
    as_long(list);
    for (size_t i = 0; i < list.size(); ++i) {
      check(list[i].scalar_type() == type && list[i].is_contiguous(), what);
      check(list[i].numel() == (masters_[i].numel() + each - 1) / each, "states must be as large as their masters");
    }
  }

  void values(const Tensors& list, bool may_be_empty) const {
    as_long(list);
    for (size_t i = 0; i < list.size(); ++i) {
      const ScalarType type = list[i].scalar_type();
      check(type == ScalarType::Float || type == ScalarType::BFloat16, "grads and weights must be float32 or bfloat16");
      check(list[i].is_contiguous(), "grads and weights must be contiguous");
      check(list[i].numel() == masters_[i].numel() || (may_be_empty && list[i].numel() == 0),
            "each grad and weight must be as large as its master");
    }
  }

 private:
  const char* op_;
  const Tensors& masters_;
};

constexpr const char* STATE = "masters and moments must be contiguous float32";

inline bool is_low(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::BFloat16; }

// Null for an empty one.
template <class T>
T* pointer(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : static_cast<T*>(tensor.mutable_data_ptr());
}

inline const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

// Of a master that is left by a step's decay.
inline float kept(double lr, double decay) { return static_cast<float>(1.0 - lr * decay); }

// lr and the root of the second moment with AdamW's corrections for the first steps, number 1 on.
inline float step_size(double lr, double beta1, int64_t number) {
  return static_cast<float>(lr / (1.0 - std::pow(beta1, static_cast<double>(number))));
}
inline float root_factor(double beta2, int64_t number) {
  return static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, static_cast<double>(number))));
}

}  // namespace megatune::bind
