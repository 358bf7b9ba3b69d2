// CPU kernels of quantised weights: plain pointers and sizes, nothing here knows torch. Each computes a range
// [begin, end) of blocks on the calling thread.
#pragma once

#include <cstdint>

#include "megatune/cpu.h"

namespace megatune::cpu {

constexpr int64_t NF4_BLOCK = 64;  // numbers that have one scale

template <class T>
struct Nf4Dense {
  const uint8_t* packed;  // [size / 2, rounded up]: two numbers a byte, the first in its high half
  const float* scales;    // [size / NF4_BLOCK, rounded up]
  int64_t size;
  T* dense;  // [size]
};

template <class T>
void nf4_dense(const Nf4Dense<T>& args, int64_t begin, int64_t end);

}  // namespace megatune::cpu
