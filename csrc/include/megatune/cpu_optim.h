// Optimizers on the CPU: plain pointers and sizes. Nothing here knows torch.
#pragma once

#include <cstdint>

#include "megatune/cpu.h"

namespace megatune::cpu {

struct AdamWStep {
  float scale;  // the gradient is multiplied by this first
  float keep;   // 1 - lr * weight_decay
  float beta1, rest1;  // rest = 1 - beta, rounded once
  float beta2, rest2;
  float eps;
  float step_size;  // lr / (1 - beta1^step)
  float root;       // 1 / sqrt(1 - beta2^step)
  bool stream;      // write the weights past the caches: there are more of them than these hold
};

// One tensor of an AdamW update. G, W: the elements of the gradient and of the weight, float or bf16.
template <class G, class W>
struct AdamW {
  float* master;
  float* exp_avg;
  float* exp_avg_sq;
  const G* grad;
  W* weight;  // receives the new master, rounded to nearest even; null: not wanted
  AdamWStep step;
};

// AdamW without fp32 masters: rounded by random bits (megatune/philox.h). Element i of the tensor is element
// e = first + i / width * stride + i % width of the parameter; 16 bits of the block e / 8 of the stream `key` are its
// own.
template <class G>
struct AdamWBf16 {
  bf16* master;
  float* exp_avg;
  float* exp_avg_sq;
  const G* grad;
  int64_t first, width, stride;
  uint64_t key, number;
  AdamWStep step;
};

// AdamW with moments in 8 bits (megatune/codes.h), a scale for each 256 elements, from the tensor's first one on.
template <class G, class W>
struct AdamW8bit {
  float* master;
  uint8_t* exp_avg;  // codes
  float* exp_avg_scale;
  uint8_t* exp_avg_sq;
  float* exp_avg_sq_scale;
  const G* grad;
  W* weight;
  int64_t n;
  AdamWStep step;
};

// One tensor of an update by Lion (arXiv:2302.06675).
template <class G, class W>
struct Lion {
  float* master;
  float* exp_avg;
  const G* grad;
  W* weight;
  float scale, keep, beta1, rest1, beta2, rest2, lr;
};

// Elements begin..end. Every element goes through the same operations, none of them fused, on every instruction set: the
// result depends neither on how the elements are shared out nor on the machine.
template <class G, class W>
void adamw(const AdamW<G, W>& args, int64_t begin, int64_t end);
template <class G>
void adamw_bf16(const AdamWBf16<G>& args, int64_t begin, int64_t end);
template <class G, class W>
void adamw_8bit(const AdamW8bit<G, W>& args, int64_t begin, int64_t end);  // begin, end: blocks of 256 elements
template <class G, class W>
void lion(const Lion<G, W>& args, int64_t begin, int64_t end);

// Sum of the squares of float or bf16 elements, in double.
template <class T>
double square_sum(const T* x, int64_t length);

}  // namespace megatune::cpu
