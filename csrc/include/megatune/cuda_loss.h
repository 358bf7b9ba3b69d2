// Launchers of losses: plain pointers, as megatune/cuda.h.
#pragma once

#include <cstdint>

#include "megatune/cuda.h"

namespace megatune::cuda {

// Cross-entropy of rows of logits, of which the columns [first, first + vocab) of a vocabulary of `size` are here. With
// z the capped logits and l the logarithm of the sum of their exponentials, a row's loss is
// weight * (l - (1 - smoothing) * z[label] - smoothing * mean(z) + z_loss * l^2).
struct CrossEntropy {
  Type type;
  void* logits;  // rows of vocab, row_stride elements from row to row
  int64_t rows, row_stride, vocab;
  int64_t first, size;
  const int64_t* labels;  // [rows], each in [0, size) or `ignore`: such a row has no loss; another label's loss is NaN
  int64_t ignore;
  const float* weights;  // [rows]; null: all 1
  float softcap;         // 0: none
  float z_loss, smoothing;
};

// The whole vocabulary is here. loss: [rows]; joined: room for [rows, 2]. The logits become their gradient if write_grad.
int cross_entropy(const CrossEntropy& args, bool write_grad, float* loss, float* joined, Stream stream);

// sums: [rows, 3], largest logit here, sum of exp(logit - largest), the label's logit (0: it is not here); with_sum:
// [rows, 4], the sum of the logits too. Weights, z_loss and smoothing play no part.
int cross_entropy_sums(const CrossEntropy& args, bool with_sum, float* sums, Stream stream);

// sums: of all `parts` of a vocabulary, one after the other, [parts, rows, 3], with smoothing [parts, rows, 4]. loss:
// [rows]; joined: [rows, 2], over the whole vocabulary the largest logit and the sum of exp(logit - largest). The logits
// play no part.
int cross_entropy_join(const CrossEntropy& args, const float* sums, int64_t parts, float* loss, float* joined,
                       Stream stream);

// The logits become their gradient. joined: [rows, 2], as above.
int cross_entropy_grad(const CrossEntropy& args, const float* joined, Stream stream);

// Rows of a tensor times a number: what backward does with gradients that forward has made.
struct Scale {
  Type from, to;  // the same, or from f32
  const void* x;
  void* out;  // x itself, or memory that nothing else of x is in
  int64_t rows, width, x_stride, out_stride;
  const float* factor;  // on the device; where it is 1 and out is x, nothing is read or written
};

int scale(const Scale& args, Stream stream);

}  // namespace megatune::cuda
