// CUDA launchers that quantise to fp8; the conventions of cuda.h.
//
// Each gives up to two copies of a matrix [rows, width]: as it is, and transposed, so that each of a linear layer's
// three products finds its inner dimension contiguous. `padded`: the rows with those of zeros that products need behind.
//
// | scaling | a scale for | scales | scales_t |
// | --- | --- | --- | --- |
// | rowwise | each row of each copy | [padded] | [width] |
// | blocks | each 128 numbers along a row of each copy | [width / 128, padded] | [padded / 128, width] |
// | tiles | each 128 x 128 | [padded / 128, width / 128] | [width / 128, padded / 128] |
// | mixed | as blocks; of the transposed copy as tiles | [width / 128, padded] | [width / 128, padded / 128] |
//
// The rows of the scales of tiles are padded to a multiple of four, with ones. rowwise needs a width and padded rows that
// are multiples of 16, the others of 128; a width is at most 2^30. mixed is for a matrix as it is.
#pragma once

#include "megatune/cuda.h"

namespace megatune::cuda {

enum class Scaling { rowwise = 0, blocks = 1, tiles = 2, mixed = 3 };

struct Fp8 {
  int64_t rows, padded, width;
  Scaling scaling;
  bool e5m2;         // else e4m3; only rowwise
  uint8_t* codes;    // [padded, width]; null, with its scales: not wanted
  float* scales;
  uint8_t* codes_t;  // [width, padded]; null, with its scales: not wanted
  float* scales_t;
  float* peaks;      // [width], workspace; null unless a rowwise transposed copy is wanted
  float* row_peaks;  // [padded], workspace right behind it; null unless both copies are wanted
};

struct Fp8Quantise {
  Type type;
  const void* x;  // rows `row_stride` elements apart
  int64_t row_stride;
  Fp8 out;
};
int fp8_quantise(const Fp8Quantise& args, Stream stream);

// Bytes of workspace that a norm of rows of this type takes; 0: none.
int64_t fp8_rms_norm_workspace(Type type, const Fp8& out);

// What `rms_norm` makes of x, rounded to its type, then quantised: in blocks, or one row-wise copy by rows.
struct Fp8RmsNorm {
  Type type, weight_type;
  const void* x;
  int64_t row_stride;
  const void* weight;  // [width]
  float offset, eps;
  bool round_first;
  float* rstd;  // [rows]
  void* workspace;
  Fp8 out;
};
int fp8_rms_norm(const Fp8RmsNorm& args, Stream stream);

// Both row-wise copies, where `fp8_rms_norm_fits`: 16 bit types, the weight's the same, no offset, whole vectors, rows
// not too long for the device. `row_peaks` is not needed.
bool fp8_rms_norm_fits(const Fp8RmsNorm& args);
int fp8_rms_norm_both(const Fp8RmsNorm& args, Stream stream);

// What `glu` makes of gate_up [rows, 2 * width], rounded to its type, then quantised.
struct Fp8Glu {
  Type type;
  const void* gate_up;
  int64_t row_stride;
  Activation activation;
  Fp8 out;
};
int fp8_glu(const Fp8Glu& args, Stream stream);

}  // namespace megatune::cuda
