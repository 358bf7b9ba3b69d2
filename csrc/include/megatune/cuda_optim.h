// Launchers of optimizers: plain pointers, as megatune/cuda.h.
#pragma once

#include <cstdint>

#include "megatune/cuda.h"

namespace megatune::cuda {

// One tensor of an AdamW update; all of n elements.
struct AdamWTensor {
  float* master;
  float* exp_avg;
  float* exp_avg_sq;
  const void* grad;  // float, or bf16 if low_grad
  void* weight;      // receives the new master, float, or bf16 (to nearest even) if low_weight; null: not wanted
  int64_t n;
  float keep;  // 1 - lr * weight_decay
  bool low_grad, low_weight;
};

struct AdamWStep {
  const float* scale;  // on the device: gradients are multiplied by it first
  float beta1, rest1;  // rest = 1 - beta, rounded once
  float beta2, rest2;
  float eps;
  float step_size;  // lr / (1 - beta1^step)
  float root;       // sqrt(1 - beta2^step)
};

// One launch for each 500 tensors.
int adamw(const AdamWTensor* tensors, int64_t count, const AdamWStep& step, Stream stream);

struct NormTensor {
  const void* data;  // [n] float, or bf16 if low
  int64_t n;
  bool low;
};
constexpr int64_t NORM_CHUNK = 16384;  // elements that a block sums

// Rows of workspace that `square_sum` needs.
int64_t square_sum_chunks(const NormTensor* tensors, int64_t count);
// out[0]: sum of all squares, always in the same order; out[1]: 1 if an element is not finite, else 0. partials:
// [chunks, 2]. Sums of 64 elements are in fp32, the rest in fp64.
int square_sum(const NormTensor* tensors, int64_t count, double* partials, double* out, Stream stream);

}  // namespace megatune::cuda
