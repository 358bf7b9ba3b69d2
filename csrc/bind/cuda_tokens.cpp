// The kernels of csrc/include/megatune/cuda_tokens.h as implementations of the ops that megatune/ops/rope_qk.py,
// embedding.py, router.py and moe.py define.

#include "megatune/cuda_tokens.h"

#include "cuda.h"

namespace megatune::bind {
namespace {

const void* data_or_null(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }
float* mutable_floats(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

void check_floats(const Tensor& tensor, const std::vector<int64_t>& shape, const char* op, const char* what) {
  check(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && sizes(tensor) == shape, op, what);
}

// [rows, width] with contiguous rows; gives the step between them.
int64_t row_step(const Tensor& tensor, const char* op, const char* what) {
  check(tensor.dim() == 2 && (tensor.stride(1) == 1 || tensor.size(1) <= 1), op, what);
  return tensor.stride(0);
}

void check_indices(const Tensor& tensor, const char* op, const char* what) {
  check(tensor.scalar_type() == ScalarType::Long && tensor.is_contiguous(), op, what);
}

// ---- queries and keys

cuda::Packed packed_of(const Tensor& qkv, const char* op) {
  check(qkv.dim() == 4 && qkv.size(2) >= 3, op, "qkv must be [tokens, groups, queries + 2, width]");
  check(qkv.stride(3) == 1 || qkv.size(3) <= 1, op, "the last dimension of qkv must be contiguous");
  return {qkv.size(0),   qkv.size(1),   qkv.size(2) - 2, qkv.size(3),
          qkv.stride(0), qkv.stride(1), qkv.stride(2)};
}

void check_angles(const Tensor& cos, const Tensor& sin, const cuda::Packed& packed, const char* op) {
  check(cos.dim() == 2 && cos.size(0) == packed.tokens && 2 * cos.size(1) <= packed.width, op,
        "cos must be [tokens, dim / 2]");
  for (const Tensor* one : {&cos, &sin})
    check_floats(*one, sizes(cos), op, "cos and sin must be contiguous float32 [tokens, dim / 2]");
}

void check_weights(const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight, const Tensor& qkv,
                   const char* op) {
  check(q_weight.has_value() == k_weight.has_value(), op, "both weights must be given, or none");
  if (!q_weight) return;
  for (const Tensor* one : {&*q_weight, &*k_weight}) {
    check(one->dim() == 1 && one->is_contiguous() && one->size(0) == qkv.size(3), op,
          "weights must be contiguous vectors as long as a head");
    check(one->scalar_type() == q_weight->scalar_type(), op, "both weights must have one dtype");
    check_devices(qkv, {one}, op);
  }
}

cuda::Type weight_type(const std::optional<Tensor>& weight, const char* op) {
  return weight ? type_of(*weight, op) : cuda::Type::f32;
}

std::tuple<Tensor, Tensor, Tensor> rope_qk(const Tensor& qkv, const Tensor& cos, const Tensor& sin,
                                           std::optional<Tensor> q_weight, std::optional<Tensor> k_weight, double eps,
                                           double offset) {
  const char* op = "rope_qk";
  const cuda::Packed packed = packed_of(qkv, op);
  check_angles(cos, sin, packed, op);
  check_weights(q_weight, k_weight, qkv, op);
  check_devices(qkv, {&cos, &sin}, op);
  const int64_t tokens = packed.tokens, groups = packed.groups, queries = packed.queries;
  Tensor q = empty(qkv, {tokens, groups, queries, packed.width});
  Tensor k = empty(qkv, {tokens, groups, packed.width});
  Tensor rstd = empty(qkv, {q_weight ? tokens : 0, groups, queries + 1}, ScalarType::Float);
  const OnDeviceOf device(qkv);
  const cuda::RopeQk args{type_of(qkv, op),
                          weight_type(q_weight, op),
                          data(qkv),
                          packed,
                          floats(cos),
                          floats(sin),
                          cos.size(1),
                          data_or_null(q_weight),
                          data_or_null(k_weight),
                          static_cast<float>(offset),
                          static_cast<float>(eps),
                          offset == 0.0,
                          mutable_data(q),
                          mutable_data(k),
                          mutable_floats(rstd)};
  check_launch(cuda::rope_qk(args, device.stream()), op);
  return {q, k, rstd};
}

cuda::Heads heads_of(const Tensor& grad, int64_t heads, const cuda::Packed& packed, const Tensor& first,
                     const char* op) {
  check(grad.dim() == 3 && grad.size(0) == packed.tokens && grad.size(1) == heads && grad.size(2) == packed.width &&
            (grad.stride(2) == 1 || packed.width <= 1) && grad.scalar_type() == first.scalar_type(),
        op, "gradients must be [tokens, heads, width] of one dtype, with a contiguous last dimension");
  check_devices(first, {&grad}, op);
  return {data(grad), grad.stride(0), grad.stride(1)};
}

std::tuple<Tensor, Tensor> rope_qk_backward(const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v,
                                            const Tensor& cos, const Tensor& sin, std::optional<Tensor> qkv,
                                            std::optional<Tensor> q_weight, std::optional<Tensor> k_weight,
                                            std::optional<Tensor> rstd, double offset, bool weight_grad) {
  const char* op = "rope_qk_backward";
  check(grad_v.dim() == 3 && grad_q.dim() == 3 && grad_v.size(1) > 0 && grad_q.size(1) % grad_v.size(1) == 0, op,
        "gradients must be [tokens, heads, width], equally many queries for each value");
  const int64_t tokens = grad_v.size(0), groups = grad_v.size(1), width = grad_v.size(2);
  const int64_t queries = grad_q.size(1) / groups;
  const std::vector<int64_t> shape{tokens, groups, queries + 2, width};
  cuda::Packed packed{tokens, groups, queries, width, groups * (queries + 2) * width, (queries + 2) * width, width};
  const bool norm = q_weight.has_value();
  check(qkv.has_value() == norm && rstd.has_value() == norm, op, "qkv and rstd are given with the weights");
  if (norm) {
    check(sizes(*qkv) == shape && qkv->scalar_type() == grad_v.scalar_type(), op,
          "qkv must be [tokens, groups, queries + 2, width] of the gradients' dtype");
    packed = packed_of(*qkv, op);
    check_weights(q_weight, k_weight, *qkv, op);
    check_floats(*rstd, {tokens, groups, queries + 1}, op,
                 "rstd must be contiguous float32 [tokens, groups, queries + 1]");
    check_devices(grad_v, {&*qkv, &*rstd}, op);
  }
  check_angles(cos, sin, packed, op);
  check_devices(grad_v, {&cos, &sin}, op);
  Tensor grad_qkv = empty(grad_v, shape);
  Tensor grad_weight = empty(grad_v, {norm && weight_grad ? 2 : 0, width}, ScalarType::Float);
  const OnDeviceOf device(grad_v);
  cuda::RopeQkBackward args{type_of(grad_v, op),
                            weight_type(q_weight, op),
                            heads_of(grad_q, groups * queries, packed, grad_v, op),
                            heads_of(grad_k, groups, packed, grad_v, op),
                            heads_of(grad_v, groups, packed, grad_v, op),
                            data_or_null(qkv),
                            packed,
                            floats(cos),
                            floats(sin),
                            cos.size(1),
                            data_or_null(q_weight),
                            data_or_null(k_weight),
                            static_cast<float>(offset),
                            norm ? floats(*rstd) : nullptr,
                            mutable_data(grad_qkv),
                            nullptr,
                            mutable_floats(grad_weight)};
  // Freed when this function returns: torch gives the memory only to what comes later on this stream.
  std::optional<Tensor> partials;
  if (norm && weight_grad) {
    partials = empty(grad_v, {std::max<int64_t>(1, cuda::rope_qk_partials(args)), 2 * width}, ScalarType::Float);
    args.partials = mutable_floats(*partials);
  }
  check_launch(cuda::rope_qk_backward(args, device.stream()), op);
  return {grad_qkv, grad_weight};
}

// ---- embedding

// int64 [tokens]
const int64_t* indices(const Tensor& tensor) { return static_cast<const int64_t*>(data(tensor)); }

Tensor embedding_rows(const Tensor& ids, const Tensor& weight, int64_t first, int64_t total) {
  const char* op = "embedding_rows";
  const int64_t stride = row_step(weight, op, "weight must be [rows, width] with contiguous rows");
  check_indices(ids, op, "ids must be contiguous int64 [tokens]");
  check(ids.dim() == 1, op, "ids must be contiguous int64 [tokens]");
  check_devices(weight, {&ids}, op);
  const int64_t count = ids.size(0), rows = weight.size(0), width = weight.size(1);
  check(first >= 0 && first <= total - rows, op, "the weight must be rows of the table");
  Tensor y = empty(weight, {count, width});
  const OnDeviceOf device(weight);
  const cuda::EmbeddingRows args{type_of(weight, op), data(weight), stride, rows,           indices(ids),
                                 first,               total,        count,  width, mutable_data(y)};
  check_launch(cuda::embedding_rows(args, device.stream()), op);
  return y;
}

Tensor embedding_backward(const Tensor& grad, const Tensor& ids, std::optional<Tensor> order, int64_t first,
                          int64_t rows) {
  const char* op = "embedding_backward";
  const int64_t stride = row_step(grad, op, "grad must be [tokens, width] with contiguous rows");
  const int64_t count = grad.size(0), width = grad.size(1);
  check_indices(ids, op, "ids must be contiguous int64 [tokens]");
  check(ids.dim() == 1 && ids.size(0) == count && count <= INT32_MAX, op, "ids must be one for each row of grad");
  check(first >= 0 && rows >= 0 && rows <= INT32_MAX, op, "the table must have fewer than 2^31 rows");
  check_devices(grad, {&ids}, op);
  if (order) {
    check_indices(*order, op, "order must be contiguous int64 [tokens]");
    check(order->numel() == count, op, "order must be as long as ids");
    check_devices(grad, {&*order}, op);
  } else {
    check(count <= cuda::EMBEDDING_ORDER, op, "the CUDA body finds the order of 65536 ids at most");
  }
  Tensor grad_weight = empty(grad, {rows, width});
  Tensor partials = empty(grad, {cuda::embedding_chunks(count), 2, width}, ScalarType::Float);
  Tensor keys = empty(ids, {order ? 0 : cuda::embedding_order_keys(count)});
  Tensor sorted = empty(ids, {2, count}, ScalarType::Int);
  Tensor named = empty(grad, {rows}, ScalarType::Byte);
  const OnDeviceOf device(grad);
  int32_t* const local = static_cast<int32_t*>(mutable_data(sorted));
  const cuda::EmbeddingBackward args{type_of(grad, op),
                                     data(grad),
                                     stride,
                                     indices(ids),
                                     order ? indices(*order) : nullptr,
                                     first,
                                     count,
                                     width,
                                     rows,
                                     static_cast<uint64_t*>(mutable_data(keys)),
                                     local,
                                     local + count,
                                     mutable_floats(partials),
                                     static_cast<uint8_t*>(mutable_data(named)),
                                     mutable_data(grad_weight)};
  check_launch(cuda::embedding_backward(args, device.stream()), op);
  return grad_weight;
}

// ---- mixture of experts

std::tuple<Tensor, Tensor, Tensor> router(const Tensor& logits, std::optional<Tensor> correction, int64_t choices,
                                          int64_t score, bool normalise, double scale, int64_t groups,
                                          int64_t groups_per_token) {
  const char* op = "router";
  check(logits.dim() == 2, op, "logits must be [tokens, experts]");
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  check_floats(logits, sizes(logits), op, "logits must be contiguous float32 [tokens, experts]");
  check(experts <= cuda::MAX_EXPERTS && choices >= 1 && choices <= cuda::MAX_CHOICES && choices <= experts, op,
        "the CUDA body takes 512 experts and 16 choices at most");
  check(groups >= 1 && groups <= cuda::MAX_GROUPS && experts % groups == 0 && groups_per_token >= 1 &&
            groups_per_token <= groups,
        op, "groups must divide the experts, 32 at most");
  check(score >= 0 && score <= 2, op, "unknown score");
  if (correction) {
    check_floats(*correction, {experts}, op, "correction must be contiguous float32 [experts]");
    check_devices(logits, {&*correction}, op);
  }
  Tensor chosen = empty(logits, {tokens, choices}, ScalarType::Long);
  Tensor weights = empty(logits, {tokens, choices});
  Tensor probabilities = empty(logits, {tokens, experts});
  const OnDeviceOf device(logits);
  const cuda::Router args{floats(logits),
                          correction ? floats(*correction) : nullptr,
                          tokens,
                          experts,
                          choices,
                          static_cast<cuda::Score>(score),
                          normalise,
                          static_cast<float>(scale),
                          groups,
                          groups_per_token,
                          static_cast<int64_t*>(mutable_data(chosen)),
                          mutable_floats(weights),
                          mutable_floats(probabilities)};
  check_launch(cuda::router(args, device.stream()), op);
  return {chosen, weights, probabilities};
}

Tensor router_backward(const Tensor& grad_weights, std::optional<Tensor> grad_probabilities, const Tensor& logits,
                       const Tensor& chosen, int64_t score, bool normalise, double scale) {
  const char* op = "router_backward";
  check(logits.dim() == 2 && chosen.dim() == 2 && chosen.size(0) == logits.size(0), op,
        "logits must be [tokens, experts] and chosen [tokens, choices]");
  const int64_t experts = logits.size(1), choices = chosen.size(1);
  check_floats(logits, sizes(logits), op, "logits must be contiguous float32 [tokens, experts]");
  check_indices(chosen, op, "chosen must be contiguous int64");
  check_floats(grad_weights, sizes(chosen), op, "grad_weights must be contiguous float32 [tokens, choices]");
  check(experts <= cuda::MAX_EXPERTS && choices <= cuda::MAX_CHOICES && score >= 0 && score <= 2, op,
        "the CUDA body takes 512 experts and 16 choices at most");
  check_devices(logits, {&grad_weights, &chosen}, op);
  if (grad_probabilities) {
    check_floats(*grad_probabilities, sizes(logits), op,
                 "grad_probabilities must be contiguous float32 [tokens, experts]");
    check_devices(logits, {&*grad_probabilities}, op);
  }
  Tensor grad_logits = empty(logits, sizes(logits));
  const OnDeviceOf device(logits);
  const cuda::RouterBackward args{floats(grad_weights),
                                  grad_probabilities ? floats(*grad_probabilities) : nullptr,
                                  floats(logits),
                                  static_cast<const int64_t*>(data(chosen)),
                                  logits.size(0),
                                  experts,
                                  choices,
                                  static_cast<cuda::Score>(score),
                                  normalise,
                                  static_cast<float>(scale),
                                  mutable_floats(grad_logits)};
  check_launch(cuda::router_backward(args, device.stream()), op);
  return grad_logits;
}

Tensor expert_take(const Tensor& x, const Tensor& index) {
  const char* op = "expert_take";
  const int64_t stride = row_step(x, op, "x must be [rows, width] with contiguous rows");
  check_indices(index, op, "index must be contiguous int64 [rows]");
  check(index.dim() == 1, op, "index must be contiguous int64 [rows]");
  check_devices(x, {&index}, op);
  const int64_t rows = index.size(0), width = x.size(1);
  Tensor y = empty(x, {rows, width});
  const OnDeviceOf device(x);
  const cuda::TakeRows args{
      type_of(x, op), data(x), x.size(0), stride, static_cast<const int64_t*>(data(index)), rows, width,
      mutable_data(y)};
  check_launch(cuda::take_rows(args, device.stream()), op);
  return y;
}

void check_places(const Tensor& place, const Tensor& first, const char* op) {
  check_indices(place, op, "place must be contiguous int64 [tokens, choices]");
  check(place.dim() == 2, op, "place must be contiguous int64 [tokens, choices]");
  check_devices(first, {&place}, op);
}

Tensor expert_copies(const Tensor& x, const Tensor& place, int64_t rows) {
  const char* op = "expert_copies";
  const int64_t stride = row_step(x, op, "x must be [tokens, width] with contiguous rows");
  check_places(place, x, op);
  check(place.size(0) == x.size(0) && rows >= 0, op, "place must be [tokens, choices]");
  Tensor y = empty(x, {rows, x.size(1)});
  const OnDeviceOf device(x);
  const cuda::CopyRows args{type_of(x, op), data(x),      stride, static_cast<const int64_t*>(data(place)),
                            x.size(0),      place.size(1), rows,   x.size(1),
                            mutable_data(y)};
  check_launch(cuda::copy_rows(args, device.stream()), op);
  return y;
}

Tensor expert_sum(const Tensor& rows, const Tensor& place, std::optional<Tensor> weights) {
  const char* op = "expert_sum";
  const int64_t stride = row_step(rows, op, "rows must be [rows, width] with contiguous rows");
  check_places(place, rows, op);
  if (weights) {
    check_floats(*weights, sizes(place), op, "weights must be contiguous float32 [tokens, choices]");
    check_devices(rows, {&*weights}, op);
  }
  Tensor y = empty(rows, {place.size(0), rows.size(1)});
  const OnDeviceOf device(rows);
  const cuda::SumChoices args{type_of(rows, op),
                              data(rows),
                              rows.size(0),
                              stride,
                              static_cast<const int64_t*>(data(place)),
                              weights ? floats(*weights) : nullptr,
                              place.size(0),
                              place.size(1),
                              rows.size(1),
                              mutable_data(y)};
  check_launch(cuda::sum_choices(args, device.stream()), op);
  return y;
}

std::tuple<Tensor, Tensor> expert_sum_backward(const Tensor& grad, std::optional<Tensor> rows, const Tensor& weights,
                                               const Tensor& place, int64_t count, bool rows_grad) {
  const char* op = "expert_sum_backward";
  const int64_t stride = row_step(grad, op, "grad must be [tokens, width] with contiguous rows");
  check(weights.dim() == 2 && weights.size(0) == grad.size(0), op, "weights must be [tokens, choices]");
  check_floats(weights, sizes(weights), op, "weights must be contiguous float32 [tokens, choices]");
  check_places(place, grad, op);
  check(sizes(place) == sizes(weights) && count >= 0, op, "place must be [tokens, choices]");
  check_devices(grad, {&weights}, op);
  const int64_t width = grad.size(1);
  int64_t row_stride = 0;
  if (rows) {
    row_stride = row_step(*rows, op, "rows must be [rows, width] with contiguous rows");
    check(rows->size(0) == count && rows->size(1) == width && rows->scalar_type() == grad.scalar_type(), op,
          "rows must be `count`, of grad's width and dtype");
    check_devices(grad, {&*rows}, op);
  }
  Tensor grad_rows = empty(grad, {rows_grad ? count : 0, width});
  Tensor grad_weights = empty(weights, {rows ? weights.size(0) : 0, weights.size(1)});
  if (!rows && !rows_grad) return {grad_rows, grad_weights};
  const OnDeviceOf device(grad);
  const cuda::CombineBackward args{type_of(grad, op),
                                   data(grad),
                                   stride,
                                   data_or_null(rows),
                                   row_stride,
                                   floats(weights),
                                   static_cast<const int64_t*>(data(place)),
                                   count,
                                   weights.size(0),
                                   weights.size(1),
                                   width,
                                   rows_grad ? mutable_data(grad_rows) : nullptr,
                                   rows ? mutable_floats(grad_weights) : nullptr};
  check_launch(cuda::combine_backward(args, device.stream()), op);
  return {grad_rows, grad_weights};
}

}  // namespace
}  // namespace megatune::bind

STABLE_TORCH_LIBRARY_IMPL(megatune, CUDA, m) {
  m.impl("rope_qk", TORCH_BOX(&megatune::bind::rope_qk));
  m.impl("rope_qk_backward", TORCH_BOX(&megatune::bind::rope_qk_backward));
  m.impl("embedding_rows", TORCH_BOX(&megatune::bind::embedding_rows));
  m.impl("embedding_backward", TORCH_BOX(&megatune::bind::embedding_backward));
  m.impl("router", TORCH_BOX(&megatune::bind::router));
  m.impl("router_backward", TORCH_BOX(&megatune::bind::router_backward));
  m.impl("expert_take", TORCH_BOX(&megatune::bind::expert_take));
  m.impl("expert_copies", TORCH_BOX(&megatune::bind::expert_copies));
  m.impl("expert_sum", TORCH_BOX(&megatune::bind::expert_sum));
  m.impl("expert_sum_backward", TORCH_BOX(&megatune::bind::expert_sum_backward));
}
