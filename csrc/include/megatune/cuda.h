// CUDA launchers: plain pointers, sizes, strides (in elements) and a stream. Nothing here knows torch.
//
// Every launcher only queues work on the stream of the current device and returns cudaError_t as an int, 0 if all went
// well. Nothing to compute (zero rows) is no error. What a launcher writes it writes whole: the memory may hold
// anything before.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace megatune::cuda {

using Stream = CUstream_st*;  // cudaStream_t

enum class Type { f32 = 0, bf16 = 1, f16 = 2 };

// Rows of contiguous elements in a tensor with up to three leading dimensions of any strides.
struct Rows {
  int64_t size[3];
  int64_t stride[3];
};

// Text of an error that a launcher returned.
const char* error_text(int error);

// 0 if the current device can run these kernels, else the error that a launch would give.
int device_error();

struct RmsNorm {
  Type type, weight_type;
  const void* x;
  Rows rows;
  int64_t width;
  const void* residual;  // null: none; else x + residual, rounded to the type, is normalised and written to `sum`
  Rows residual_rows;
  void* sum;           // [rows, width]; null without a residual
  const void* weight;  // [width]
  float offset;        // the factor is offset + weight
  float eps;
  bool round_first;  // round the normalised x to its type before the multiplication
  void* y;           // [rows, width]
  float* rstd;       // [rows]
};
int rms_norm(const RmsNorm& args, Stream stream);

struct RmsNormBackward {
  Type type, weight_type;
  const void* grad;  // [rows, width]
  const void* x;     // what was normalised
  Rows rows;
  int64_t width;
  const void* grad_sum;  // [rows, width], added to the gradient; null: none
  const void* weight;
  float offset;
  const float* rstd;   // [rows]
  void* grad_x;        // [rows, width]
  float* partials;    // [rms_norm_partials(..), width]; null: no gradient of the weight
  void* grad_weight;  // [width], of the weight's type
};
// Rows of workspace for the gradient of the weight: one for each block, two where rows are long and fp32. The order of
// its sum depends on the number of blocks (and so on the device).
int64_t rms_norm_partials(const RmsNormBackward& args);
int rms_norm_backward(const RmsNormBackward& args, Stream stream);

// `clamped`: GPT-OSS's gate, gate * sigmoid(1.702 gate) * (up + 1) of values held within a limit; of `glu` and
// `glu_backward` alone.
enum class Activation { silu = 0, gelu = 1, gelu_tanh = 2, clamped = 3 };

struct Glu {
  Type type;
  const void* gate_up;  // rows of 2 * width, pairs (gate, up); row_stride elements from row to row
  int64_t rows, row_stride, width;
  Activation activation;
  void* y;  // [rows, width]
};
int glu(const Glu& args, Stream stream);

struct GluBackward {
  Type type;
  const void* grad;  // [rows, width]
  const void* gate_up;
  int64_t rows, row_stride, width;
  Activation activation;
  void* grad_gate_up;  // [rows, 2 * width]
};
int glu_backward(const GluBackward& args, Stream stream);

// Queries and keys: of each token `groups` groups, of each group `queries` query heads and a key. Strides in elements.
struct Rope {
  Type type;
  const void* q;  // [tokens, groups, queries, width] with contiguous rows
  const void* k;  // [tokens, groups, width] likewise
  int64_t tokens, groups, queries, width;
  int64_t q_strides[3], k_strides[2];
  const float* cos;  // [tokens, half], 2 * half <= width
  const float* sin;
  int64_t half;
  bool inverse;
  void* turned_q;  // contiguous, as `turned_k`
  void* turned_k;
};
int rope(const Rope& args, Stream stream);

}  // namespace megatune::cuda
