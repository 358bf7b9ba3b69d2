// The CUDA kernels of quantised weights as implementations of the ops that megatune/ops/quant.py defines.

#include "cuda.h"
#include "megatune/cuda_quant.h"

namespace megatune::bind {
namespace {

// dtype: as _DTYPES in megatune/ops/quant.py.
Tensor dense_of(const Tensor& like, int64_t rows, int64_t columns, int64_t dtype, const char* op) {
  constexpr ScalarType types[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  check(dtype >= 0 && dtype <= 2, op, "the CUDA body gives float32, bfloat16 and float16");
  return empty(like, {rows, columns}, types[dtype]);
}

bool is_vector(const Tensor& tensor, ScalarType type, int64_t size) {
  return tensor.scalar_type() == type && tensor.is_contiguous() && tensor.numel() == size;
}

Tensor nf4_dense(const Tensor& packed, const Tensor& scales, const Tensor& nested, const Tensor& offset,
                 const Tensor& code, int64_t rows, int64_t columns, int64_t dtype) {
  const char* op = "nf4_dense";
  check(rows >= 0 && columns >= 0, op, "rows and columns must not be negative");
  const int64_t size = rows * columns;
  const int64_t blocks = (size + cuda::NF4_BLOCK - 1) / cuda::NF4_BLOCK;
  check(is_vector(packed, ScalarType::Byte, (size + 1) / 2), op, "packed must be contiguous uint8, two numbers a byte");
  check(is_vector(scales, ScalarType::Byte, blocks), op, "scales must be contiguous uint8, one for 64 numbers");
  check(is_vector(nested, ScalarType::Float, (blocks + cuda::NF4_NESTED - 1) / cuda::NF4_NESTED), op,
        "nested must be contiguous float32, one for 256 scales");
  check(is_vector(offset, ScalarType::Float, 1), op, "offset must be one float32");
  check(is_vector(code, ScalarType::Float, 256), op, "code must be contiguous float32 [256]");
  check_devices(packed, {&scales, &nested, &offset, &code}, op);
  const OnDeviceOf device(packed);
  Tensor dense = dense_of(packed, rows, columns, dtype, op);
  const cuda::Nf4Dense args{type_of(dense, op),
                            static_cast<const uint8_t*>(data(packed)),
                            static_cast<const uint8_t*>(data(scales)),
                            static_cast<const float*>(data(nested)),
                            static_cast<const float*>(data(offset)),
                            static_cast<const float*>(data(code)),
                            size,
                            mutable_data(dense)};
  check_launch(cuda::nf4_dense(args, device.stream()), op);
  return dense;
}

Tensor int8_dense(const Tensor& numbers, const Tensor& scales, double step, int64_t dtype) {
  const char* op = "int8_dense";
  check(numbers.dim() == 2 && numbers.scalar_type() == ScalarType::Char && numbers.is_contiguous(), op,
        "numbers must be contiguous int8 [out, in]");
  check(is_vector(scales, ScalarType::Float, numbers.size(0)), op, "scales must be contiguous float32 [out]");
  check_devices(numbers, {&scales}, op);
  const OnDeviceOf device(numbers);
  Tensor dense = dense_of(numbers, numbers.size(0), numbers.size(1), dtype, op);
  const cuda::Int8Dense args{type_of(dense, op),
                             static_cast<const int8_t*>(data(numbers)),
                             static_cast<const float*>(data(scales)),
                             numbers.size(0),
                             numbers.size(1),
                             static_cast<float>(step),
                             mutable_data(dense)};
  check_launch(cuda::int8_dense(args, device.stream()), op);
  return dense;
}

}  // namespace
}  // namespace megatune::bind

STABLE_TORCH_LIBRARY_IMPL(megatune, CUDA, m) {
  m.impl("nf4_dense", TORCH_BOX(&megatune::bind::nf4_dense));
  m.impl("int8_dense", TORCH_BOX(&megatune::bind::int8_dense));
}
