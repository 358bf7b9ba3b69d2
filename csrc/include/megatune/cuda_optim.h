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
  float root;       // 1 / sqrt(1 - beta2^step)
};

// One launch for each 500 tensors.
int adamw(const AdamWTensor* tensors, int64_t count, const AdamWStep& step, Stream stream);

// AdamW without fp32 masters: `master` is bf16, rounded by random bits (megatune/philox.h). Element i of the tensor
// is element e = first + i / width * stride + i % width of the parameter: a run of it (width >= n), or a part of each
// of its rows (n < 2^32); 16 bits of the block e / 8 of the stream `key` are its own.
struct AdamWBf16Tensor {
  void* master;  // bf16
  float* exp_avg;
  float* exp_avg_sq;
  const void* grad;  // float, or bf16 if low_grad
  int64_t n;
  int64_t first, width, stride;
  uint64_t key;
  float keep;
  bool low_grad;
};
int adamw_bf16(const AdamWBf16Tensor* tensors, int64_t count, const AdamWStep& step, uint64_t number, Stream stream);

// AdamW with moments in 8 bits (megatune/codes.h), a scale for each 256 elements, from the tensor's first one on.
struct AdamW8bitTensor {
  float* master;
  uint8_t* exp_avg;  // codes
  float* exp_avg_scale;
  uint8_t* exp_avg_sq;
  float* exp_avg_sq_scale;
  const void* grad;
  void* weight;  // as in AdamWTensor
  int64_t n;
  float keep;
  bool low_grad, low_weight;
};
int adamw_8bit(const AdamW8bitTensor* tensors, int64_t count, const AdamWStep& step, Stream stream);

// One tensor of an update by Lion; as AdamWTensor.
struct LionTensor {
  float* master;
  float* exp_avg;
  const void* grad;
  void* weight;
  int64_t n;
  float keep;
  bool low_grad, low_weight;
};
struct LionStep {
  const float* scale;
  float beta1, rest1, beta2, rest2;
  float lr;
};
int lion(const LionTensor* tensors, int64_t count, const LionStep& step, Stream stream);

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
