// CUDA launcher of dropout; the conventions of cuda.h.
#pragma once

#include "megatune/cuda.h"

namespace megatune::cuda {

// The mask is a function of the element's row and column and of the key: as megatune/ops/dropout.py says.
struct KeyedDropout {
  Type type;
  const void* x;  // rows of `width`, stride elements from row to row
  int64_t rows, stride, width;
  const int64_t* names;  // [rows]: what each row is in the whole; null: 0, 1, ..
  uint32_t low, high;    // the scrambled key, 31 bits each
  int64_t first_column;
  uint32_t threshold;  // up to 2^31: of so many hashes of 2^31 the element is 0
  float scale;         // of those that are kept
  void* y;             // [rows, width]
};
int keyed_dropout(const KeyedDropout& args, Stream stream);

}  // namespace megatune::cuda
