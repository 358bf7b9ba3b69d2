// Launchers of what turns, looks up or moves the rows of tokens: plain pointers, as megatune/cuda.h.
#pragma once

#include <cstdint>

#include "megatune/cuda.h"

namespace megatune::cuda {

// ---- queries and keys of a packed product

// The product of the q, k, v projection: of each token `groups` groups, of each group `queries` query heads, a key and a
// value, `width` contiguous elements each. Strides in elements.
struct Packed {
  int64_t tokens, groups, queries, width;
  int64_t token_stride, group_stride, head_stride;
};

struct RopeQk {
  Type type, weight_type;
  const void* qkv;
  Packed packed;
  const float* cos;  // [tokens, half], 2 * half <= width
  const float* sin;
  int64_t half;
  const void* q_weight;  // [width], of the heads' norm; null: none of both
  const void* k_weight;
  float offset, eps;  // as those of RmsNorm
  bool round_first;
  void* q;      // [tokens, groups, queries, width]
  void* k;      // [tokens, groups, width]
  float* rstd;  // [tokens, groups, queries + 1], the key's last; not written without a norm
};
int rope_qk(const RopeQk& args, Stream stream);

// [tokens, heads, width] with contiguous rows.
struct Heads {
  const void* data;
  int64_t token_stride, head_stride;
};

struct RopeQkBackward {
  Type type, weight_type;
  Heads grad_q, grad_k, grad_v;  // groups * queries heads, groups, groups
  const void* qkv;               // null without a norm
  Packed packed;
  const float* cos;
  const float* sin;
  int64_t half;
  const void* q_weight;  // null: no norm
  const void* k_weight;
  float offset;
  const float* rstd;
  void* grad_qkv;      // [tokens, groups, queries + 2, width]
  float* partials;     // [rope_qk_partials(..), 2 * width]; null: no gradient of the weights
  float* grad_weight;  // [2, width]: of q's, of k's
};
// Rows of workspace for the gradients of the weights; the order of their sums depends on this number.
int64_t rope_qk_partials(const RopeQkBackward& args);
// With a norm neither `half` nor what is beyond the rotated elements may be longer than this.
constexpr int64_t ROPE_QK_NORM = 256;
int rope_qk_backward(const RopeQkBackward& args, Stream stream);

// ---- rows of a table, and its gradient

struct EmbeddingRows {
  Type type;
  const void* table;  // rows of `width`, stride elements from row to row: those from `first` on of `total`
  int64_t stride, rows;
  const int64_t* ids;  // [count]; rows that are elsewhere: zeros; an id that is not in [0, total) stops the device
  int64_t first, total;
  int64_t count, width;
  void* y;  // [count, width]
};
int embedding_rows(const EmbeddingRows& args, Stream stream);

// Ids whose order EmbeddingBackward finds by itself.
constexpr int64_t EMBEDDING_ORDER = 65536;

struct EmbeddingBackward {
  Type type;
  const void* grad;  // rows of `width`, grad_stride elements from row to row
  int64_t grad_stride;
  const int64_t* ids;    // [count]: rows of a table; those outside of [first, first + rows) add nothing
  const int64_t* order;  // [count]: sorts the ids by row, equal ones ascending, those outside last; null: it is found
  int64_t first;
  int64_t count, width;
  int64_t rows;       // below 2^31
  uint64_t* keys;     // [embedding_order_keys(count)], workspace; null with `order`
  int32_t* sorted;    // [count], workspace
  int32_t* tokens;    // [count], workspace
  float* partials;    // [embedding_chunks(count), 2, width], workspace
  uint8_t* named;     // [rows], workspace
  void* grad_weight;  // [rows, width], written whole
};
int64_t embedding_order_keys(int64_t count);
// Pieces in which the rows are summed first: their number depends on the count alone.
int64_t embedding_chunks(int64_t count);
int embedding_backward(const EmbeddingBackward& args, Stream stream);

// ---- mixture of experts

enum class Score { softmax = 0, sigmoid = 1, topk_softmax = 2 };
constexpr int64_t MAX_EXPERTS = 512, MAX_CHOICES = 16, MAX_GROUPS = 32;

struct Router {
  const float* logits;      // [tokens, experts]
  const float* correction;  // [experts], added to the scores for the choice alone; null: none
  int64_t tokens, experts, choices;
  Score score;
  bool normalise;
  float scale;
  int64_t groups, groups_per_token;  // experts of so many groups, those of the best `groups_per_token` can be chosen
  int64_t* chosen;       // [tokens, choices], the best first; of equal ones the lower number
  float* weights;        // [tokens, choices]
  float* probabilities;  // [tokens, experts]
};
int router(const Router& args, Stream stream);

struct RouterBackward {
  const float* grad_weights;        // [tokens, choices]
  const float* grad_probabilities;  // [tokens, experts]; null: zero
  const float* logits;
  const int64_t* chosen;
  int64_t tokens, experts, choices;
  Score score;
  bool normalise;
  float scale;
  float* grad_logits;  // [tokens, experts]
};
int router_backward(const RouterBackward& args, Stream stream);

struct TakeRows {
  Type type;
  const void* x;  // x_rows rows of `width`, stride elements from row to row
  int64_t x_rows, stride;
  const int64_t* index;  // [rows]; outside of x: zeros
  int64_t rows, width;
  void* y;  // [rows, width]
};
int take_rows(const TakeRows& args, Stream stream);

// Each token's row to its places, each of which is of one assignment only.
struct CopyRows {
  Type type;
  const void* x;  // [tokens, width], stride elements from row to row
  int64_t stride;
  const int64_t* place;  // [tokens, choices]: a row of y, or one outside of it for a choice that has none
  int64_t tokens, choices, row_count, width;
  void* y;  // [row_count, width]
};
int copy_rows(const CopyRows& args, Stream stream);

struct SumChoices {
  Type type;
  const void* rows;  // row_count rows of `width`, stride elements from row to row
  int64_t row_count, stride;
  const int64_t* place;  // [tokens, choices]: a row, or one outside of them, which adds nothing
  const float* weights;  // [tokens, choices]; null: 1
  int64_t tokens, choices, width;
  void* y;  // [tokens, width]
};
int sum_choices(const SumChoices& args, Stream stream);

struct CombineBackward {
  Type type;
  const void* grad;  // [tokens, width], stride elements from row to row
  int64_t grad_stride;
  const void* rows;  // [row_count, width], stride elements from row to row; null: no gradient of the weights
  int64_t row_stride;
  const float* weights;  // [tokens, choices]
  const int64_t* place;  // [tokens, choices]: as in CopyRows
  int64_t row_count, tokens, choices, width;
  void* grad_rows;      // [row_count, width]; null: not wanted
  float* grad_weights;  // [tokens, choices]; null without rows. Assignments without a row get 0
};
int combine_backward(const CombineBackward& args, Stream stream);

}  // namespace megatune::cuda
