// The CPU kernels as implementations of the ops that Python defines (megatune/ops): the only CPU file that sees torch,
// and only through its stable ABI, so that one binary serves every torch from the target version on.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "megatune/cpu.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace cpu = megatune::cpu;

// megatune/ops/_load.py looks for this text in the file before it loads it.
extern "C" __attribute__((visibility("default"), used)) const char megatune_cpu_signature[] =
    "megatune-cpu-abi=" MEGATUNE_CPU_ABI ";";

namespace {

void check(bool good, const char* op, const char* what) {
  STD_TORCH_CHECK(good, "megatune::", op, ": ", what);
}

// Calls body with a null pointer of the element type.
template <class Body>
void with_type(const Tensor& tensor, const char* op, Body&& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return body(static_cast<float*>(nullptr));
    case ScalarType::BFloat16: return body(static_cast<cpu::bf16*>(nullptr));
    default: check(false, op, "the CPU body takes float32 and bfloat16");
  }
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

std::vector<int64_t> sizes(const Tensor& tensor) {
  std::vector<int64_t> result(tensor.dim());
  for (int64_t i = 0; i < tensor.dim(); ++i) result[i] = tensor.size(i);
  return result;
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, std::optional<ScalarType> type = std::nullopt) {
  return torch::stable::new_empty(like, shape, type);
}

// The leading dimensions of x as rows; at most three of them.
cpu::Rows rows_of(const Tensor& x, const char* op) {
  const int64_t leading = x.dim() - 1;
  check(leading >= 1 && leading <= 3, op, "x must have two to four dimensions");
  check(x.stride(leading) == 1 || x.size(leading) <= 1, op, "the last dimension of x must be contiguous");
  cpu::Rows rows{{1, 1, 1}, {0, 0, 0}};
  for (int64_t i = 0; i < leading; ++i) {
    // Tokens first, heads last: a missing dimension is one of the heads.
    const int64_t place = i == 0 ? 0 : i + 3 - leading;
    rows.size[place] = x.size(i);
    rows.stride[place] = x.stride(i);
  }
  return rows;
}

int64_t grain(int64_t width) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width)); }

// offset + weight as fp32.
std::vector<float> scale_of(const Tensor& weight, double offset, const char* op) {
  check(weight.dim() == 1 && weight.is_contiguous(), op, "weight must be a contiguous vector");
  std::vector<float> scale(weight.size(0));
  with_type(weight, op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = data<T>(weight);
    for (size_t i = 0; i < scale.size(); ++i) {
      float value;
      if constexpr (std::is_same_v<T, float>) {
        value = from[i];
      } else {
        value = std::bit_cast<float>(static_cast<uint32_t>(from[i].bits) << 16);
      }
      scale[i] = static_cast<float>(offset) + value;
    }
  });
  return scale;
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset) {
  const char* op = "rms_norm";
  const int64_t width = x.size(x.dim() - 1);
  check(weight.numel() == width, op, "weight does not fit the last dimension of x");
  const cpu::Rows rows = rows_of(x, op);
  const std::vector<float> scale = scale_of(weight, offset, op);
  std::vector<int64_t> shape = sizes(x);
  Tensor y = empty(x, shape);
  shape.pop_back();
  Tensor rstd = empty(x, shape, ScalarType::Float);
  with_type(x, op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const cpu::RmsNorm<T> args{data<T>(x), rows, width, scale.data(), static_cast<float>(eps), offset == 0.0,
                               mutable_data<T>(y), mutable_data<float>(rstd)};
    torch::stable::parallel_for(0, rstd.numel(), grain(width),
                                [&](int64_t begin, int64_t end) { cpu::rms_norm(args, begin, end); });
  });
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd, double offset, bool weight_grad) {
  const char* op = "rms_norm_backward";
  const int64_t width = x.size(x.dim() - 1);
  check(grad.is_contiguous() && rstd.is_contiguous(), op, "grad and rstd must be contiguous");
  check(grad.numel() == x.numel() && grad.scalar_type() == x.scalar_type(), op, "grad must be like x");
  check(rstd.numel() * width == x.numel() && rstd.scalar_type() == ScalarType::Float, op, "rstd must be fp32 [rows]");
  check(weight.numel() == width, op, "weight does not fit the last dimension of x");
  const cpu::Rows rows = rows_of(x, op);
  const std::vector<float> scale = scale_of(weight, offset, op);
  const int64_t count = rstd.numel();
  Tensor grad_x = empty(x, sizes(x));
  Tensor grad_weight = empty(weight, {weight_grad ? width : 0}, ScalarType::Float);
  // One share of the rows and one sum for each thread, so that the result depends on their number only.
  const int64_t shares = std::min<int64_t>(torch::stable::get_num_threads(), std::max<int64_t>(1, count / grain(width)));
  std::vector<double> totals(weight_grad ? shares * width : 0);
  std::vector<float> sums(totals.size());
  with_type(x, op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    torch::stable::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
      for (int64_t share = first; share < last; ++share) {
        const cpu::RmsNormBackward<T> args{data<T>(grad), data<T>(x), rows, width, scale.data(), data<float>(rstd),
                                           mutable_data<T>(grad_x),
                                           weight_grad ? totals.data() + share * width : nullptr,
                                           weight_grad ? sums.data() + share * width : nullptr};
        cpu::rms_norm_backward(args, count * share / shares, count * (share + 1) / shares);
      }
    });
  });
  if (weight_grad) {
    float* to = mutable_data<float>(grad_weight);
    for (int64_t i = 0; i < width; ++i) {
      double total = 0.0;
      for (int64_t share = 0; share < shares; ++share) total += totals[share * width + i];
      to[i] = static_cast<float>(total);
    }
  }
  return {grad_x, torch::stable::to(grad_weight, weight.scalar_type())};
}

Tensor turned(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  const char* op = "rope";
  check(x.dim() >= 2, op, "x must have two to four dimensions");
  const cpu::Rows rows = rows_of(x, op);
  const int64_t width = x.size(x.dim() - 1);
  check(cos.dim() == 2 && sin.dim() == 2 && cos.size(0) == x.size(0) && sin.size(0) == x.size(0) &&
            cos.size(1) == sin.size(1) && 2 * cos.size(1) <= width,
        op, "cos and sin must be [tokens, dim / 2]");
  check(cos.is_contiguous() && sin.is_contiguous() && cos.scalar_type() == ScalarType::Float &&
            sin.scalar_type() == ScalarType::Float,
        op, "cos and sin must be contiguous float32");
  Tensor y = empty(x, sizes(x));
  const int64_t heads = rows.size[1] * rows.size[2];
  with_type(x, op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const cpu::Rope<T> args{data<T>(x),       rows,           width, data<float>(cos), data<float>(sin),
                            cos.size(1), inverse, mutable_data<T>(y)};
    torch::stable::parallel_for(0, heads == 0 ? 0 : x.size(0), grain(width * heads),
                                [&](int64_t begin, int64_t end) { cpu::rope(args, begin, end); });
  });
  return y;
}

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool inverse) {
  return {turned(q, cos, sin, inverse), turned(k, cos, sin, inverse)};
}

struct GluShape {
  int64_t rows, row_stride, width;
  std::vector<int64_t> out;
};

GluShape glu_shape(const Tensor& gate_up, int64_t activation, const char* op) {
  check(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, op, "gate_up must be [tokens, 2 * width]");
  check(gate_up.stride(1) == 1 || gate_up.size(1) == 0, op, "the last dimension of gate_up must be contiguous");
  check(activation >= 0 && activation <= 2, op, "unknown activation");
  const int64_t width = gate_up.size(1) / 2;
  return {width == 0 ? 0 : gate_up.size(0), gate_up.stride(0), width, {gate_up.size(0), width}};
}

Tensor glu(const Tensor& gate_up, int64_t activation) {
  const GluShape shape = glu_shape(gate_up, activation, "glu");
  Tensor y = empty(gate_up, shape.out);
  with_type(gate_up, "glu", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const cpu::Glu<T> args{data<T>(gate_up), shape.row_stride, shape.width, static_cast<cpu::Activation>(activation),
                           mutable_data<T>(y)};
    torch::stable::parallel_for(0, shape.rows, grain(2 * shape.width),
                                [&](int64_t begin, int64_t end) { cpu::glu(args, begin, end); });
  });
  return y;
}

Tensor glu_backward(const Tensor& grad, const Tensor& gate_up, int64_t activation) {
  const char* op = "glu_backward";
  const GluShape shape = glu_shape(gate_up, activation, op);
  check(grad.is_contiguous() && grad.numel() * 2 == gate_up.numel() && grad.scalar_type() == gate_up.scalar_type(), op,
        "grad must be contiguous [tokens, width] of gate_up's dtype");
  Tensor grad_gate_up = empty(gate_up, sizes(gate_up));
  with_type(gate_up, op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const cpu::GluBackward<T> args{data<T>(grad), data<T>(gate_up), shape.row_stride, shape.width,
                                   static_cast<cpu::Activation>(activation), mutable_data<T>(grad_gate_up)};
    torch::stable::parallel_for(0, shape.rows, grain(2 * shape.width),
                                [&](int64_t begin, int64_t end) { cpu::glu_backward(args, begin, end); });
  });
  return grad_gate_up;
}

// softcap 0: none. With write_grad the gradient takes the place of the logits.
Tensor cross_entropy_rows(Tensor logits, const Tensor& labels, double softcap, bool write_grad,
                          std::optional<Tensor> weights, double z_loss, double smoothing, int64_t ignore) {
  const char* op = "cross_entropy_rows";
  check(logits.dim() == 2 && logits.size(1) > 0 && (logits.stride(1) == 1 || logits.size(1) == 1), op,
        "logits must be [rows, vocab], each row contiguous");
  check(labels.dim() == 1 && labels.is_contiguous() && labels.size(0) == logits.size(0) &&
            labels.scalar_type() == ScalarType::Long,
        op, "labels must be contiguous int64 [rows]");
  check(!weights || (weights->is_contiguous() && weights->numel() == logits.size(0) &&
                     weights->scalar_type() == ScalarType::Float),
        op, "weights must be contiguous float32 [rows]");
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  const int64_t* label = data<int64_t>(labels);
  for (int64_t row = 0; row < rows; ++row)
    STD_TORCH_CHECK((label[row] >= 0 && label[row] < vocab) || label[row] == ignore,
                    "megatune::cross_entropy_rows: label ", label[row], " in row ", row,
                    " is not below the vocabulary size ", vocab);
  Tensor loss = empty(logits, {rows}, ScalarType::Float);
  with_type(logits, op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const cpu::CrossEntropy<T> args{mutable_data<T>(logits),
                                    logits.stride(0),
                                    vocab,
                                    label,
                                    ignore,
                                    weights ? data<float>(*weights) : nullptr,
                                    static_cast<float>(softcap),
                                    static_cast<float>(z_loss),
                                    static_cast<float>(smoothing),
                                    write_grad,
                                    mutable_data<float>(loss)};
    torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) { cpu::cross_entropy(args, begin, end); });
  });
  return loss;
}

cpu::Attention attention_args(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& borders, double scale,
                              int64_t window, double softcap, const char* op) {
  check(q.dim() == 3 && k.dim() == 3 && v.dim() == 3 && borders.dim() == 1, op, "q, k and v must be [tokens, heads, D]");
  for (const Tensor* x : {&q, &k, &v}) {
    check(x->scalar_type() == ScalarType::BFloat16, op, "the CPU body takes bfloat16");
    check(x->stride(2) == 1, op, "the last dimension must be contiguous");
    check(x->size(0) == q.size(0) && x->size(2) == q.size(2), op, "q, k and v must have the same tokens and width");
  }
  check(k.size(1) == v.size(1) && q.size(1) % k.size(1) == 0, op, "heads of q must be a multiple of those of k and v");
  check(borders.scalar_type() == ScalarType::Int && borders.is_contiguous(), op, "cu_seqlens must be int32");
  const int32_t* border = data<int32_t>(borders);
  const int64_t documents = borders.size(0) - 1;
  check(documents >= 0 && border[0] == 0 && border[documents] == q.size(0), op, "cu_seqlens must span the tokens");
  for (int64_t i = 0; i < documents; ++i) check(border[i] <= border[i + 1], op, "cu_seqlens must not fall");
  check(cpu::has_amx(), op, "this CPU has no AMX tiles");
  return {data<cpu::bf16>(q), data<cpu::bf16>(k), data<cpu::bf16>(v), q.stride(0), q.stride(1), k.stride(0),
          k.stride(1),        v.stride(0),        v.stride(1),        q.size(0),   q.size(1),   k.size(1),
          q.size(2),          border,             static_cast<float>(scale),       window,
          static_cast<float>(softcap),            nullptr,            nullptr};
}

// window 0 and softcap 0: none.
std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& borders,
                                     double scale, int64_t window, double softcap) {
  cpu::Attention args = attention_args(q, k, v, borders, scale, window, softcap, "attention");
  Tensor out = empty(q, sizes(q));
  Tensor lse = empty(q, {args.heads, args.tokens}, ScalarType::Float);
  args.out = mutable_data<cpu::bf16>(out);
  args.lse = mutable_data<float>(lse);
  torch::stable::parallel_for(0, (borders.size(0) - 1) * args.kv_heads, 1,
                              [&](int64_t begin, int64_t end) { cpu::attention(args, begin, end); });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& out, const Tensor& lse,
                                                      const Tensor& borders, double scale, int64_t window,
                                                      double softcap) {
  const char* op = "attention_backward";
  cpu::AttentionBackward args{attention_args(q, k, v, borders, scale, window, softcap, op), nullptr, nullptr, nullptr,
                              nullptr};
  for (const Tensor* x : {&grad, &out})
    check(x->is_contiguous() && x->numel() == q.numel() && x->scalar_type() == ScalarType::BFloat16, op,
          "grad and out must be contiguous and like q");
  check(lse.is_contiguous() && lse.numel() == q.size(0) * q.size(1) && lse.scalar_type() == ScalarType::Float, op,
        "lse must be fp32 [heads, tokens]");
  Tensor grad_q = empty(q, sizes(q)), grad_k = empty(k, sizes(k)), grad_v = empty(v, sizes(v));
  args.forward.out = static_cast<cpu::bf16*>(const_cast<void*>(out.const_data_ptr()));
  args.forward.lse = static_cast<float*>(const_cast<void*>(lse.const_data_ptr()));
  args.grad = data<cpu::bf16>(grad);
  args.grad_q = mutable_data<cpu::bf16>(grad_q);
  args.grad_k = mutable_data<cpu::bf16>(grad_k);
  args.grad_v = mutable_data<cpu::bf16>(grad_v);
  torch::stable::parallel_for(0, (borders.size(0) - 1) * args.forward.kv_heads, 1,
                              [&](int64_t begin, int64_t end) { cpu::attention_backward(args, begin, end); });
  return {grad_q, grad_k, grad_v};
}

bool cpu_has_amx() { return cpu::has_amx(); }

int64_t cpu_isa() { return static_cast<int64_t>(cpu::isa()); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatune, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("glu", TORCH_BOX(&glu));
  m.impl("glu_backward", TORCH_BOX(&glu_backward));
  m.impl("cross_entropy_rows", TORCH_BOX(&cross_entropy_rows));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

STABLE_TORCH_LIBRARY_FRAGMENT(megatune, m) {
  m.def("cpu_isa() -> int");
  m.def("cpu_has_amx() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(megatune, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_has_amx", TORCH_BOX(&cpu_has_amx));
}
