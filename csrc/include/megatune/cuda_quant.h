// CUDA launchers that make quantised weights dense; the conventions of cuda.h.
#pragma once

#include "megatune/cuda.h"

namespace megatune::cuda {

constexpr int64_t NF4_BLOCK = 64;    // numbers that have one scale
constexpr int64_t NF4_NESTED = 256;  // scales that have one scale

struct Nf4Dense {
  Type type;
  const uint8_t* packed;  // [size / 2, rounded up]: two numbers a byte, the first in its high half
  const uint8_t* scales;  // [size / NF4_BLOCK, rounded up]: places in `code`
  const float* nested;    // [scales / NF4_NESTED, rounded up]
  const float* offset;    // one number: a scale is code[place] * nested + offset
  const float* code;      // [256]
  int64_t size;
  void* dense;  // [size]
};
int nf4_dense(const Nf4Dense& args, Stream stream);

struct Int8Dense {
  Type type;
  const int8_t* numbers;  // [rows, columns]
  const float* scales;    // [rows]
  int64_t rows, columns;
  float step;   // an element is number * scale * step
  void* dense;  // [rows, columns]
};
int int8_dense(const Int8Dense& args, Stream stream);

}  // namespace megatune::cuda
