// CPU kernels: plain pointers, sizes and strides. Nothing here knows torch.
//
// Each kernel computes a range [begin, end) of rows on the calling thread; the caller shares out the rows.
#pragma once

#include <cstdint>

namespace megatune::cpu {

struct bf16 {
  uint16_t bits;
};

enum class Isa { plain = 0, avx2 = 1, avx512 = 2 };

// What this machine runs: the best that it and the build know, or less if MEGATUNE_CPU_ISA (plain, avx2) says so.
Isa isa();

// Rows of `width` contiguous elements in a tensor whose leading dimensions have any strides (in elements).
struct Rows {
  int64_t size[3];
  int64_t stride[3];
};

template <class T>
struct RmsNorm {
  const T* x;
  Rows rows;
  int64_t width;
  const float* scale;  // [width]: offset + weight
  float eps;
  bool round_first;  // round the normalised x to T before the multiplication
  T* y;              // [rows, width]
  float* rstd;       // [rows]
};

template <class T>
struct RmsNormBackward {
  const T* grad;  // [rows, width]
  const T* x;
  Rows rows;
  int64_t width;
  const float* scale;
  const float* rstd;
  T* grad_x;            // [rows, width]
  double* grad_weight;  // [width], of the calling thread alone, what is added to; null: not wanted
  float* sums;          // [width], of the calling thread alone, zeros, which they are afterwards too
};

template <class T>
struct Rope {
  const T* x;
  Rows rows;  // size[0] tokens, size[1] x size[2] heads
  int64_t width;
  const float* cos;  // [tokens, half]
  const float* sin;
  int64_t half;
  bool inverse;
  T* y;  // [tokens, heads, width]
};

enum class Activation { silu = 0, gelu = 1, gelu_tanh = 2 };

template <class T>
struct Glu {
  const T* gate_up;  // rows of 2 * width, pairs (gate, up); row_stride elements from row to row
  int64_t row_stride;
  int64_t width;
  Activation activation;
  T* y;  // [rows, width]
};

template <class T>
struct GluBackward {
  const T* grad;  // [rows, width]
  const T* gate_up;
  int64_t row_stride;
  int64_t width;
  Activation activation;
  T* grad_gate_up;  // [rows, 2 * width]
};

template <class T>
struct CrossEntropy {
  T* logits;  // rows of vocab, row_stride elements from row to row; becomes the gradient if write_grad
  int64_t row_stride, vocab;
  const int64_t* labels;  // [rows], each in [0, vocab) or `ignore`: such a row has no loss
  int64_t ignore;
  const float* weights;  // [rows], of the losses; null: all 1
  float softcap;         // 0: none
  float z_loss;          // of the square of logsumexp
  float smoothing;       // share of the target that is spread over the vocabulary
  bool write_grad;
  float* loss;  // [rows]
};

// Causal attention inside documents, bf16, on AMX tiles. Token t, head h of q starts at q + t * q_token + h * q_head.
struct Attention {
  const bf16 *q, *k, *v;
  int64_t q_token, q_head, k_token, k_head, v_token, v_head;
  int64_t tokens, heads, kv_heads, width;
  const int32_t* borders;  // [documents + 1]
  float scale;
  int64_t window;  // tokens a query sees, itself included; 0: all
  float softcap;   // 0: none
  bf16* out;       // [tokens, heads, width]
  float* lse;      // [heads, tokens], natural logarithm
};

struct AttentionBackward {
  Attention forward;  // out and lse as the forward pass left them
  const bf16* grad;   // [tokens, heads, width]
  bf16* grad_q;       // [tokens, heads, width]
  bf16 *grad_k, *grad_v;  // [tokens, kv_heads, width]
};

// Whether this machine and the operating system let us use AMX tiles.
bool has_amx();

// begin, end: tasks, of which there are documents * kv_heads.
void attention(const Attention& args, int64_t begin, int64_t end);
void attention_backward(const AttentionBackward& args, int64_t begin, int64_t end);

// T is float or bf16 in all of these.
template <class T>
void rms_norm(const RmsNorm<T>& args, int64_t begin, int64_t end);
template <class T>
void rms_norm_backward(const RmsNormBackward<T>& args, int64_t begin, int64_t end);
template <class T>
void rope(const Rope<T>& args, int64_t begin, int64_t end);  // begin, end: tokens
template <class T>
void glu(const Glu<T>& args, int64_t begin, int64_t end);
template <class T>
void glu_backward(const GluBackward<T>& args, int64_t begin, int64_t end);
template <class T>
void cross_entropy(const CrossEntropy<T>& args, int64_t begin, int64_t end);

}  // namespace megatune::cpu
