// The CUDA kernels as implementations of the ops that Python defines (megatune/ops), through torch's stable ABI only, so
// that one binary serves every torch from the target version on.

#include "cuda.h"

using namespace megatune::bind;
namespace cuda = megatune::cuda;

// megatune/ops/_load.py looks for this text in the file before it loads it.
extern "C" __attribute__((visibility("default"), used)) const char megatune_cuda_signature[] =
    "megatune-cuda-abi=" MEGATUNE_CUDA_ABI ";";

namespace {

void check_weight(const Tensor& weight, int64_t width, const char* op) {
  check(weight.dim() == 1 && weight.is_contiguous() && weight.size(0) == width, op,
        "weight must be a contiguous vector that fits the last dimension of x");
}

// residual and sum: null, or both given; then the norm is of x + residual, which is written to sum.
std::tuple<Tensor, Tensor> norm(const Tensor& x, const Tensor* residual, Tensor* sum, const Tensor& weight, double eps,
                                double offset, const char* op) {
  const cuda::Rows rows = rows_of(x, op);
  const int64_t width = x.size(x.dim() - 1);
  check_weight(weight, width, op);
  check_devices(x, {&weight}, op);
  std::vector<int64_t> shape = sizes(x);
  Tensor y = empty(x, shape);
  shape.pop_back();
  Tensor rstd = empty(x, shape, ScalarType::Float);
  const OnDeviceOf device(x);
  const cuda::RmsNorm args{type_of(x, op),
                           type_of(weight, op),
                           data(x),
                           rows,
                           width,
                           residual == nullptr ? nullptr : data(*residual),
                           residual == nullptr ? rows : rows_of(*residual, op),
                           residual == nullptr ? nullptr : mutable_data(*sum),
                           data(weight),
                           static_cast<float>(offset),
                           static_cast<float>(eps),
                           offset == 0.0,
                           mutable_data(y),
                           static_cast<float*>(mutable_data(rstd))};
  check_launch(cuda::rms_norm(args, device.stream()), op);
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset) {
  return norm(x, nullptr, nullptr, weight, eps, offset, "rms_norm");
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                double eps, double offset) {
  const char* op = "add_rms_norm";
  check(residual.scalar_type() == x.scalar_type() && sizes(residual) == sizes(x), op, "residual must be like x");
  check_devices(x, {&residual}, op);
  Tensor sum = empty(x, sizes(x));
  auto [y, rstd] = norm(x, &residual, &sum, weight, eps, offset, op);
  return {sum, y, rstd};
}

// grad_sum: added to the gradient of x; null: none.
std::tuple<Tensor, Tensor> norm_gradients(const Tensor& grad, const Tensor* grad_sum, const Tensor& x,
                                          const Tensor& weight, const Tensor& rstd, double offset, bool weight_grad,
                                          const char* op) {
  const cuda::Rows rows = rows_of(x, op);
  const int64_t width = x.size(x.dim() - 1);
  check_weight(weight, width, op);
  check_like(grad, x, op, "grad must be contiguous and like x");
  check(rstd.is_contiguous() && rstd.numel() * width == x.numel() && rstd.scalar_type() == ScalarType::Float, op,
        "rstd must be contiguous float32 [rows]");
  check_devices(x, {&grad, &weight, &rstd}, op);
  Tensor grad_x = empty(x, sizes(x));
  Tensor grad_weight = empty(weight, {weight_grad ? width : 0});
  const OnDeviceOf device(x);
  cuda::RmsNormBackward args{type_of(x, op),
                             type_of(weight, op),
                             data(grad),
                             data(x),
                             rows,
                             width,
                             grad_sum == nullptr ? nullptr : data(*grad_sum),
                             data(weight),
                             static_cast<float>(offset),
                             static_cast<const float*>(data(rstd)),
                             mutable_data(grad_x),
                             nullptr,
                             mutable_data(grad_weight)};
  // Freed when this function returns: torch gives the memory only to what comes later on this stream.
  std::optional<Tensor> partials;
  if (weight_grad) {
    partials = empty(weight, {std::max<int64_t>(1, cuda::rms_norm_partials(args)), width}, ScalarType::Float);
    args.partials = static_cast<float*>(mutable_data(*partials));
  }
  check_launch(cuda::rms_norm_backward(args, device.stream()), op);
  return {grad_x, grad_weight};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd, double offset, bool weight_grad) {
  return norm_gradients(grad, nullptr, x, weight, rstd, offset, weight_grad, "rms_norm_backward");
}

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool inverse) {
  const char* op = "rope";
  check(q.dim() == 4 && k.dim() == 3 && q.size(0) == k.size(0) && q.size(1) == k.size(1) && q.size(3) == k.size(2) &&
            q.scalar_type() == k.scalar_type(),
        op, "q must be [tokens, groups, queries, width] and k [tokens, groups, width], of one dtype");
  const int64_t width = q.size(3);
  check((q.stride(3) == 1 && k.stride(2) == 1) || width <= 1, op, "the last dimension of q and k must be contiguous");
  check(cos.dim() == 2 && sin.dim() == 2 && cos.size(0) == q.size(0) && sin.size(0) == q.size(0) &&
            cos.size(1) == sin.size(1) && 2 * cos.size(1) <= width,
        op, "cos and sin must be [tokens, dim / 2]");
  check(cos.is_contiguous() && sin.is_contiguous() && cos.scalar_type() == ScalarType::Float &&
            sin.scalar_type() == ScalarType::Float,
        op, "cos and sin must be contiguous float32");
  check_devices(q, {&k, &cos, &sin}, op);
  Tensor turned_q = empty(q, sizes(q)), turned_k = empty(k, sizes(k));
  const OnDeviceOf device(q);
  const cuda::Rope args{type_of(q, op),
                        data(q),
                        data(k),
                        q.size(0),
                        q.size(1),
                        q.size(2),
                        width,
                        {q.stride(0), q.stride(1), q.stride(2)},
                        {k.stride(0), k.stride(1)},
                        static_cast<const float*>(data(cos)),
                        static_cast<const float*>(data(sin)),
                        cos.size(1),
                        inverse,
                        mutable_data(turned_q),
                        mutable_data(turned_k)};
  check_launch(cuda::rope(args, device.stream()), op);
  return {turned_q, turned_k};
}

cuda::Activation activation_of(int64_t activation, const char* op) {
  check(activation >= 0 && activation <= 2, op, "unknown activation");
  return static_cast<cuda::Activation>(activation);
}

void check_glu(const Tensor& gate_up, const char* op) {
  check(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, op, "gate_up must be [tokens, 2 * width]");
  check(gate_up.stride(1) == 1 || gate_up.size(1) == 0, op, "the last dimension of gate_up must be contiguous");
}

Tensor gated(const Tensor& gate_up, cuda::Activation activation, const char* op) {
  check_glu(gate_up, op);
  const int64_t width = gate_up.size(1) / 2;
  Tensor y = empty(gate_up, {gate_up.size(0), width});
  const OnDeviceOf device(gate_up);
  const cuda::Glu args{type_of(gate_up, op), data(gate_up), gate_up.size(0), gate_up.stride(0),
                       width,                activation,    mutable_data(y)};
  check_launch(cuda::glu(args, device.stream()), op);
  return y;
}

Tensor gated_backward(const Tensor& grad, const Tensor& gate_up, cuda::Activation activation, const char* op) {
  check_glu(gate_up, op);
  const int64_t width = gate_up.size(1) / 2;
  check(grad.dim() == 2 && grad.size(0) == gate_up.size(0) && grad.size(1) == width && grad.is_contiguous() &&
            grad.scalar_type() == gate_up.scalar_type(),
        op, "grad must be contiguous [tokens, width] of gate_up's dtype");
  check_devices(gate_up, {&grad}, op);
  Tensor grad_gate_up = empty(gate_up, sizes(gate_up));
  const OnDeviceOf device(gate_up);
  const cuda::GluBackward args{type_of(gate_up, op), data(grad), data(gate_up),
                               gate_up.size(0),      gate_up.stride(0),
                               width,                activation, mutable_data(grad_gate_up)};
  check_launch(cuda::glu_backward(args, device.stream()), op);
  return grad_gate_up;
}

Tensor glu(const Tensor& gate_up, int64_t activation) {
  return gated(gate_up, activation_of(activation, "glu"), "glu");
}

Tensor glu_backward(const Tensor& grad, const Tensor& gate_up, int64_t activation) {
  const char* op = "glu_backward";
  return gated_backward(grad, gate_up, activation_of(activation, op), op);
}

Tensor clamped_glu(const Tensor& gate_up) { return gated(gate_up, cuda::Activation::clamped, "clamped_glu"); }

Tensor clamped_glu_backward(const Tensor& grad, const Tensor& gate_up) {
  return gated_backward(grad, gate_up, cuda::Activation::clamped, "clamped_glu_backward");
}

std::tuple<Tensor, Tensor> add_rms_norm_backward(const Tensor& grad, const Tensor& grad_sum, const Tensor& total,
                                                 const Tensor& weight, const Tensor& rstd, double offset,
                                                 bool weight_grad) {
  const char* op = "add_rms_norm_backward";
  check_like(grad_sum, total, op, "grad_sum must be contiguous and like the sum");
  check_devices(total, {&grad_sum}, op);
  return norm_gradients(grad, &grad_sum, total, weight, rstd, offset, weight_grad, op);
}

int64_t cuda_error() { return cuda::device_error(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatune, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("add_rms_norm_backward", TORCH_BOX(&add_rms_norm_backward));
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("glu", TORCH_BOX(&glu));
  m.impl("glu_backward", TORCH_BOX(&glu_backward));
  m.impl("clamped_glu", TORCH_BOX(&clamped_glu));
  m.impl("clamped_glu_backward", TORCH_BOX(&clamped_glu_backward));
}

STABLE_TORCH_LIBRARY_FRAGMENT(megatune, m) { m.def("cuda_error() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(megatune, CompositeExplicitAutograd, m) { m.impl("cuda_error", TORCH_BOX(&cuda_error)); }
