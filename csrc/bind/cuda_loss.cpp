// The losses' CUDA kernels as implementations of the ops that megatune/ops/cross_entropy_rows.py defines.

#include "cuda.h"
#include "megatune/cuda_loss.h"

namespace megatune::bind {
namespace {

float* floats(const Tensor& tensor) { return static_cast<float*>(mutable_data(tensor)); }

// A number for each of the rows of `first`, which is on the same device.
void check_rows(const Tensor& tensor, ScalarType type, const Tensor& first, int64_t rows, const char* op,
                const char* what) {
  check(tensor.dim() == 1 && tensor.is_contiguous() && tensor.size(0) == rows && tensor.scalar_type() == type, op,
        what);
  check_devices(first, {&tensor}, op);
}

// What a loss needs beside the logits, or their sums, which are `first`.
cuda::CrossEntropy options(const Tensor& first, int64_t rows, const Tensor& labels,
                           const std::optional<Tensor>& weights, double z_loss, double smoothing, int64_t ignore,
                           const char* op) {
  check(rows < int64_t{1} << 31, op, "there are too many rows");
  check_rows(labels, ScalarType::Long, first, rows, op, "labels must be contiguous int64 [rows]");
  if (weights) check_rows(*weights, ScalarType::Float, first, rows, op, "weights must be contiguous float32 [rows]");
  cuda::CrossEntropy args{};
  args.rows = rows;
  args.labels = static_cast<const int64_t*>(data(labels));
  args.ignore = ignore;
  args.weights = weights ? static_cast<const float*>(data(*weights)) : nullptr;
  args.z_loss = static_cast<float>(z_loss);
  args.smoothing = static_cast<float>(smoothing);
  return args;
}

// size 0: the whole vocabulary is here.
cuda::CrossEntropy arguments(const Tensor& logits, const Tensor& labels, int64_t first, int64_t size, double softcap,
                             const std::optional<Tensor>& weights, double z_loss, double smoothing, int64_t ignore,
                             const char* op) {
  check(logits.dim() == 2 && logits.size(1) > 0 && logits.size(1) < int64_t{1} << 31 &&
            (logits.stride(1) == 1 || logits.size(1) == 1),
        op, "logits must be [rows, vocab], each row contiguous");
  cuda::CrossEntropy args = options(logits, logits.size(0), labels, weights, z_loss, smoothing, ignore, op);
  args.type = type_of(logits, op);
  args.logits = const_cast<void*>(data(logits));
  args.row_stride = logits.stride(0);
  args.vocab = logits.size(1);
  args.first = first;
  args.size = size == 0 ? logits.size(1) : size;
  args.softcap = static_cast<float>(softcap);
  return args;
}

Tensor cross_entropy_rows(Tensor logits, const Tensor& labels, double softcap, bool write_grad,
                          std::optional<Tensor> weights, double z_loss, double smoothing, int64_t ignore) {
  const char* op = "cross_entropy_rows";
  const cuda::CrossEntropy args = arguments(logits, labels, 0, 0, softcap, weights, z_loss, smoothing, ignore, op);
  const OnDeviceOf device(logits);
  Tensor loss = empty(logits, {logits.size(0)}, ScalarType::Float);
  Tensor joined = empty(loss, {logits.size(0), 2});
  check_launch(cuda::cross_entropy(args, write_grad, floats(loss), floats(joined), device.stream()), op);
  return loss;
}

Tensor cross_entropy_sums(const Tensor& logits, const Tensor& labels, int64_t first, int64_t size, double softcap,
                          bool with_sum, int64_t ignore) {
  const char* op = "cross_entropy_sums";
  const cuda::CrossEntropy args = arguments(logits, labels, first, size, softcap, std::nullopt, 0.0, 0.0, ignore, op);
  const OnDeviceOf device(logits);
  Tensor sums = empty(logits, {logits.size(0), with_sum ? 4 : 3}, ScalarType::Float);
  check_launch(cuda::cross_entropy_sums(args, with_sum, floats(sums), device.stream()), op);
  return sums;
}

std::tuple<Tensor, Tensor> cross_entropy_join(const Tensor& sums, const Tensor& labels, int64_t size,
                                              std::optional<Tensor> weights, double z_loss, double smoothing,
                                              int64_t ignore) {
  const char* op = "cross_entropy_join";
  check(sums.dim() == 3 && sums.is_contiguous() && sums.scalar_type() == ScalarType::Float &&
            sums.size(2) == (smoothing != 0.0 ? 4 : 3),
        op, "sums must be contiguous float32 [parts, rows, 3], with label smoothing [parts, rows, 4]");
  cuda::CrossEntropy args = options(sums, sums.size(1), labels, weights, z_loss, smoothing, ignore, op);
  args.size = size;
  const OnDeviceOf device(sums);
  Tensor loss = empty(sums, {args.rows}), joined = empty(sums, {args.rows, 2});
  const float* from = static_cast<const float*>(data(sums));
  check_launch(cuda::cross_entropy_join(args, from, sums.size(0), floats(loss), floats(joined), device.stream()), op);
  return {loss, joined};
}

void cross_entropy_grad(Tensor logits, const Tensor& labels, int64_t first, int64_t size, double softcap,
                        const Tensor& joined, std::optional<Tensor> weights, double z_loss, double smoothing,
                        int64_t ignore) {
  const char* op = "cross_entropy_grad";
  const cuda::CrossEntropy args =
      arguments(logits, labels, first, size, softcap, weights, z_loss, smoothing, ignore, op);
  check(joined.dim() == 2 && joined.is_contiguous() && joined.size(0) == args.rows && joined.size(1) == 2 &&
            joined.scalar_type() == ScalarType::Float,
        op, "joined must be contiguous float32 [rows, 2]");
  check_devices(logits, {&joined}, op);
  const OnDeviceOf device(logits);
  check_launch(cuda::cross_entropy_grad(args, static_cast<const float*>(data(joined)), device.stream()), op);
}

void scale_gradient(Tensor out, const Tensor& x, const Tensor& factor) {
  const char* op = "scale_gradient";
  check(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) == 1), op, "x must be [rows, width], each row contiguous");
  check(sizes(out) == sizes(x) && (out.stride(1) == 1 || out.size(1) == 1), op,
        "out must have x's shape, each row contiguous");
  check(out.scalar_type() == x.scalar_type() || x.scalar_type() == ScalarType::Float, op,
        "out must have x's dtype, or x float32");
  check(factor.numel() == 1 && factor.scalar_type() == ScalarType::Float, op, "factor must be one float32");
  check_devices(x, {&out, &factor}, op);
  const OnDeviceOf device(x);
  const bool plain = x.is_contiguous() && out.is_contiguous();
  const cuda::Scale args{type_of(x, op),
                         type_of(out, op),
                         data(x),
                         mutable_data(out),
                         plain ? 1 : x.size(0),
                         plain ? x.numel() : x.size(1),
                         x.stride(0),
                         out.stride(0),
                         static_cast<const float*>(data(factor))};
  check_launch(cuda::scale(args, device.stream()), op);
}

}  // namespace
}  // namespace megatune::bind

STABLE_TORCH_LIBRARY_IMPL(megatune, CUDA, m) {
  m.impl("cross_entropy_rows", TORCH_BOX(&megatune::bind::cross_entropy_rows));
  m.impl("cross_entropy_sums", TORCH_BOX(&megatune::bind::cross_entropy_sums));
  m.impl("cross_entropy_join", TORCH_BOX(&megatune::bind::cross_entropy_join));
  m.impl("cross_entropy_grad", TORCH_BOX(&megatune::bind::cross_entropy_grad));
  m.impl("scale_gradient", TORCH_BOX(&megatune::bind::scale_gradient));
}
