// The CUDA kernel of dropout as an implementation of the op that megatune/ops/dropout.py defines.

#include "megatune/cuda_dropout.h"

#include "cuda.h"

namespace megatune::bind {
namespace {

Tensor keyed_dropout(const Tensor& x, std::optional<Tensor> rows, int64_t low, int64_t high, int64_t first_column,
                     int64_t threshold, double scale) {
  const char* op = "keyed_dropout";
  constexpr int64_t most = int64_t{1} << 31;
  check(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) <= 1), op, "x must be [rows, width] with contiguous rows");
  check(low >= 0 && low < most && high >= 0 && high < most && threshold >= 0 && threshold <= most, op,
        "low, high and threshold must be of 31 bits");
  if (rows) {
    check(rows->dim() == 1 && rows->size(0) == x.size(0) && rows->is_contiguous() &&
              rows->scalar_type() == ScalarType::Long,
          op, "rows must be contiguous int64 [rows]");
    check_devices(x, {&*rows}, op);
  }
  Tensor y = empty(x, sizes(x));
  const OnDeviceOf device(x);
  const cuda::KeyedDropout args{type_of(x, op),
                                data(x),
                                x.size(0),
                                x.stride(0),
                                x.size(1),
                                rows ? static_cast<const int64_t*>(data(*rows)) : nullptr,
                                static_cast<uint32_t>(low),
                                static_cast<uint32_t>(high),
                                first_column,
                                static_cast<uint32_t>(threshold),
                                static_cast<float>(scale),
                                mutable_data(y)};
  check_launch(cuda::keyed_dropout(args, device.stream()), op);
  return y;
}

}  // namespace
}  // namespace megatune::bind

STABLE_TORCH_LIBRARY_IMPL(megatune, CUDA, m) { m.impl("keyed_dropout", TORCH_BOX(&megatune::bind::keyed_dropout)); }
