// The fp8 CUDA kernels as implementations of the ops that megatune/ops/fp8_quantise.py defines.

#include <algorithm>

#include "cuda.h"
#include "megatune/cuda_fp8.h"

namespace megatune::bind {
namespace {

constexpr int ROWS = 1, TRANSPOSED = 2;  // which copies are wanted: the sum of these

// Codes and scales of both copies; those that are not wanted are empty.
struct Copies {
  Tensor codes, scales, codes_t, scales_t;
  std::optional<Tensor> peaks;  // freed with this: torch gives the memory only to what comes later on this stream
  cuda::Fp8 out;
};

Copies copies_of(const Tensor& like, int64_t rows, int64_t width, int64_t scaling, bool e5m2, int64_t copies,
                 const char* op) {
  check(scaling >= 0 && scaling <= 3, op, "unknown scaling");
  check(copies >= 1 && copies <= 3, op, "copies must be 1, 2 or 3");
  const auto kind = static_cast<cuda::Scaling>(scaling);
  const bool rowwise = kind == cuda::Scaling::rowwise;
  check(!e5m2 || rowwise, op, "e5m2 is for rowwise scales");
  const int64_t step = rowwise ? 16 : 128;
  check(width % step == 0 && width <= int64_t{1} << 30, op, "the width must be a multiple of 16, of 128 with blocks");
  const int64_t padded = std::max<int64_t>(1, (rows + step - 1) / step) * step;
  const auto four = [](int64_t count) { return (count + 3) / 4 * 4; };
  std::vector<int64_t> scales{padded}, scales_t{width};
  if (kind == cuda::Scaling::blocks) scales = {width / 128, padded}, scales_t = {padded / 128, width};
  if (kind == cuda::Scaling::tiles) scales = {padded / 128, four(width / 128)};
  if (kind == cuda::Scaling::mixed) scales = {width / 128, padded};
  if (kind == cuda::Scaling::tiles || kind == cuda::Scaling::mixed)
    scales_t = {width / 128, four(padded / 128)};
  const bool first = copies & ROWS, second = copies & TRANSPOSED;
  const std::vector<int64_t> none{0};
  Copies made{empty(like, first ? std::vector<int64_t>{padded, width} : none, ScalarType::Byte),
              empty(like, first ? scales : none, ScalarType::Float),
              empty(like, second ? std::vector<int64_t>{width, padded} : none, ScalarType::Byte),
              empty(like, second ? scales_t : none, ScalarType::Float),
              std::nullopt,
              {rows, padded, width, kind, e5m2, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr}};
  if (first) {
    made.out.codes = static_cast<uint8_t*>(mutable_data(made.codes));
    made.out.scales = static_cast<float*>(mutable_data(made.scales));
  }
  if (second) {
    made.out.codes_t = static_cast<uint8_t*>(mutable_data(made.codes_t));
    made.out.scales_t = static_cast<float*>(mutable_data(made.scales_t));
  }
  if (second && rowwise) {
    made.peaks = empty(like, {first ? width + padded : width}, ScalarType::Float);
    made.out.peaks = static_cast<float*>(mutable_data(*made.peaks));
    if (first) made.out.row_peaks = made.out.peaks + width;
  }
  return made;
}

// What a norm needs besides, in place of peaks, which it has none of.
void* norm_workspace(Copies& made, const Tensor& x, const char* op) {
  const int64_t bytes = cuda::fp8_rms_norm_workspace(type_of(x, op), made.out);
  if (bytes == 0) return nullptr;
  made.peaks = empty(x, {bytes}, ScalarType::Byte);
  return mutable_data(*made.peaks);
}

void check_matrix(const Tensor& x, const char* op) {
  check(x.dim() == 2, op, "the input must be a matrix");
  check(x.stride(1) == 1 || x.size(1) <= 1, op, "the last dimension of the input must be contiguous");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fp8_quantise(const Tensor& x, int64_t scaling, bool e5m2, int64_t copies) {
  const char* op = "fp8_quantise";
  check_matrix(x, op);
  const OnDeviceOf device(x);
  Copies made = copies_of(x, x.size(0), x.size(1), scaling, e5m2, copies, op);
  const cuda::Fp8Quantise args{type_of(x, op), data(x), x.stride(0), made.out};
  check_launch(cuda::fp8_quantise(args, device.stream()), op);
  return {made.codes, made.scales, made.codes_t, made.scales_t};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fp8_rms_norm(const Tensor& x, const Tensor& weight, double eps,
                                                                double offset, int64_t scaling, int64_t copies) {
  const char* op = "fp8_rms_norm";
  check_matrix(x, op);
  check(weight.dim() == 1 && weight.is_contiguous() && weight.size(0) == x.size(1), op,
        "weight must be a contiguous vector that fits the last dimension of x");
  check(scaling < static_cast<int64_t>(cuda::Scaling::tiles), op, "the scales must be of rows or blocks");
  check_devices(x, {&weight}, op);
  const OnDeviceOf device(x);
  Copies made = copies_of(x, x.size(0), x.size(1), scaling, false, copies, op);
  Tensor rstd = empty(x, {x.size(0)}, ScalarType::Float);
  const cuda::Fp8RmsNorm args{type_of(x, op),
                              type_of(weight, op),
                              data(x),
                              x.stride(0),
                              data(weight),
                              static_cast<float>(offset),
                              static_cast<float>(eps),
                              offset == 0.0,
                              static_cast<float*>(mutable_data(rstd)),
                              norm_workspace(made, x, op),
                              made.out};
  const bool both = made.out.peaks != nullptr && made.out.codes != nullptr && cuda::fp8_rms_norm_fits(args);
  if (made.out.peaks != nullptr && !both) {
    // What no kernel takes along is written in between.
    Tensor y = empty(x, sizes(x));
    const cuda::Rows rows = rows_of(x, op);
    const cuda::RmsNorm norm{type_of(x, op), type_of(weight, op), data(x), rows, x.size(1), nullptr, rows, nullptr,
                             data(weight), static_cast<float>(offset), static_cast<float>(eps), offset == 0.0,
                             mutable_data(y), static_cast<float*>(mutable_data(rstd))};
    check_launch(cuda::rms_norm(norm, device.stream()), op);
    check_launch(cuda::fp8_quantise({type_of(x, op), data(y), x.size(1), made.out}, device.stream()), op);
    return {made.codes, made.scales, made.codes_t, made.scales_t, rstd};
  }
  const auto launch = both ? cuda::fp8_rms_norm_both : cuda::fp8_rms_norm;
  check_launch(launch(args, device.stream()), op);
  return {made.codes, made.scales, made.codes_t, made.scales_t, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fp8_glu(const Tensor& gate_up, int64_t activation, int64_t scaling,
                                                   int64_t copies) {
  const char* op = "fp8_glu";
  check_matrix(gate_up, op);
  check(gate_up.size(1) % 2 == 0, op, "gate_up must be [tokens, 2 * width]");
  check(activation >= 0 && activation <= 2, op, "unknown activation");
  check(scaling < static_cast<int64_t>(cuda::Scaling::tiles), op, "the scales must be of rows or blocks");
  const OnDeviceOf device(gate_up);
  Copies made = copies_of(gate_up, gate_up.size(0), gate_up.size(1) / 2, scaling, false, copies, op);
  const cuda::Fp8Glu args{type_of(gate_up, op), data(gate_up), gate_up.stride(0),
                          static_cast<cuda::Activation>(activation), made.out};
  check_launch(cuda::fp8_glu(args, device.stream()), op);
  return {made.codes, made.scales, made.codes_t, made.scales_t};
}

}  // namespace
}  // namespace megatune::bind

STABLE_TORCH_LIBRARY_IMPL(megatune, CUDA, m) {
  m.impl("fp8_quantise", TORCH_BOX(&megatune::bind::fp8_quantise));
  m.impl("fp8_rms_norm", TORCH_BOX(&megatune::bind::fp8_rms_norm));
  m.impl("fp8_glu", TORCH_BOX(&megatune::bind::fp8_glu));
}
