// The CPU kernels of quantised weights as implementations of the ops that megatune/ops/quant.py defines, through
// torch's stable ABI.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "megatune/cpu_quant.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace cpu = megatune::cpu;

namespace {

constexpr int64_t GRAIN = 512;  // blocks that are worth a thread of their own

void check(bool good, const char* what) { STD_TORCH_CHECK(good, "megatune::nf4_dequantise: ", what); }

template <class T>
void fill(const Tensor& packed, const Tensor& scales, const Tensor& dense) {
  const cpu::Nf4Dense<T> args{
      static_cast<const uint8_t*>(packed.const_data_ptr()),
      static_cast<const float*>(scales.const_data_ptr()),
      dense.numel(),
      static_cast<T*>(dense.mutable_data_ptr()),
  };
  torch::stable::parallel_for(0, scales.numel(), GRAIN,
                              [&](int64_t begin, int64_t end) { cpu::nf4_dense(args, begin, end); });
}

// dtype: 0 float32, 1 bfloat16, as _DTYPES in megatune/ops/quant.py.
Tensor nf4_dequantise(const Tensor& packed, const Tensor& scales, int64_t rows, int64_t columns, int64_t dtype) {
  check(rows >= 0 && columns >= 0, "rows and columns must not be negative");
  const int64_t size = rows * columns;
  check(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() && packed.numel() == (size + 1) / 2,
        "packed must be contiguous uint8, two numbers a byte");
  check(scales.scalar_type() == ScalarType::Float && scales.is_contiguous() &&
            scales.numel() == (size + cpu::NF4_BLOCK - 1) / cpu::NF4_BLOCK,
        "scales must be contiguous float32, one for 64 numbers");
  check(dtype == 0 || dtype == 1, "the CPU body gives float32 and bfloat16");
  const std::vector<int64_t> shape{rows, columns};
  Tensor dense = torch::stable::new_empty(packed, shape, dtype ? ScalarType::BFloat16 : ScalarType::Float);
  if (dtype) {
    fill<cpu::bf16>(packed, scales, dense);
  } else {
    fill<float>(packed, scales, dense);
  }
  return dense;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatune, CPU, m) { m.impl("nf4_dequantise", TORCH_BOX(&nf4_dequantise)); }
