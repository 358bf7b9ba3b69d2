// Optimizers on the CPU: plain pointers and sizes. Nothing here knows torch.
#pragma once

#include <cstdint>

#include "megatune/cpu.h"

namespace megatune::cpu {

// One tensor of an AdamW update. G, W: the elements of the gradient and of the weight, float or bf16.
template <class G, class W>
struct AdamW {
  float* master;
  float* exp_avg;
  float* exp_avg_sq;
  const G* grad;
  W* weight;    // receives the new master, rounded to nearest even; null: not wanted
  float scale;  // the gradient is multiplied by this first
  float keep;   // 1 - lr * weight_decay
  float beta1, rest1;  // rest = 1 - beta, rounded once
  float beta2, rest2;
  float eps;
  float step_size;  // lr / (1 - beta1^step)
  float root;       // sqrt(1 - beta2^step)
  bool stream;      // write the weights past the caches: there are more of them than these hold
};

// Elements begin..end. Every element goes through the same operations, none of them fused, on every instruction set: the
// result depends neither on how the elements are shared out nor on the machine.
template <class G, class W>
void adamw(const AdamW<G, W>& args, int64_t begin, int64_t end);

// Sum of the squares of float or bf16 elements, in double.
template <class T>
double square_sum(const T* x, int64_t length);

}  // namespace megatune::cpu
