// What the files that bind CUDA kernels share: checks, pointers, the current stream, errors.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "megatune/cuda.h"

namespace megatune::bind {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(bool good, const char* op, const char* what) {
  STD_TORCH_CHECK(good, "megatune::", op, ": ", what);
}

// Makes the tensor's device the current one until the end of the scope, and gives its current stream.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor)
      : guard_(tensor.get_device_index()), stream_(current(tensor.get_device_index())) {}
  cuda::Stream stream() const { return stream_; }

 private:
  // Looked up in the library that torch has loaded: a build of torch without CUDA, on which this file is compiled just
  // as well, has no such library to link with.
  static cuda::Stream current(int32_t device) {
    using Function = AOTITorchError (*)(int32_t, void**);
    static const Function function = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
      return library == nullptr ? nullptr
                                : reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
    }();
    STD_TORCH_CHECK(function != nullptr, "megatune: this torch has no CUDA stream");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(function(device, &stream));  // its namesake with STABLE_ came with torch 2.13
    return static_cast<cuda::Stream>(stream);
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Stream stream_;
};

inline void check_launch(int error, const char* op) {
  STD_TORCH_CHECK(error == 0, "megatune::", op, ": CUDA error ", error, ", ", cuda::error_text(error));
}

inline cuda::Type type_of(const Tensor& tensor, const char* op) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return cuda::Type::f32;
    case ScalarType::BFloat16: return cuda::Type::bf16;
    case ScalarType::Half: return cuda::Type::f16;
    default: check(false, op, "the CUDA body takes float32, bfloat16 and float16");
  }
  return cuda::Type::f32;
}

inline const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }
inline void* mutable_data(const Tensor& tensor) { return tensor.mutable_data_ptr(); }

inline std::vector<int64_t> sizes(const Tensor& tensor) {
  std::vector<int64_t> result(tensor.dim());
  for (int64_t i = 0; i < tensor.dim(); ++i) result[i] = tensor.size(i);
  return result;
}

// Contiguous, on the device of `like`, of its type if none is given. Not through the dispatcher, as torch's `new_empty`
// goes by name: a third of its time.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape,
                    std::optional<ScalarType> type = std::nullopt) {
  std::vector<int64_t> strides(shape.size());
  int64_t step = 1;
  for (size_t i = shape.size(); i-- > 0; step *= std::max<int64_t>(1, shape[i])) strides[i] = step;
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                  static_cast<int32_t>(type.value_or(like.scalar_type())), device,
                                                  like.get_device_index(), &result));
  return Tensor(result);
}

// Kernels get raw pointers: everything must be on the device of the first tensor.
inline void check_devices(const Tensor& first, std::initializer_list<const Tensor*> others, const char* op) {
  for (const Tensor* other : others)
    check(other->is_cuda() && other->get_device_index() == first.get_device_index(), op,
          "all tensors must be on one CUDA device");
}

// Contiguous, of the sizes and the type of x.
inline void check_like(const Tensor& tensor, const Tensor& x, const char* op, const char* what) {
  bool same = tensor.is_contiguous() && tensor.scalar_type() == x.scalar_type() && tensor.dim() == x.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = tensor.size(i) == x.size(i);
  check(same, op, what);
}

// The leading dimensions of x as rows; at most three of them.
inline cuda::Rows rows_of(const Tensor& x, const char* op) {
  const int64_t leading = x.dim() - 1;
  check(leading >= 1 && leading <= 3, op, "x must have two to four dimensions");
  check(x.stride(leading) == 1 || x.size(leading) <= 1, op, "the last dimension of x must be contiguous");
  check(x.size(leading) < int64_t{1} << 31, op, "the last dimension of x is too long");
  cuda::Rows rows{{1, 1, 1}, {0, 0, 0}};
  for (int64_t i = 0; i < leading; ++i) {
    // Tokens first, heads last: a missing dimension is one of the heads.
    const int64_t place = i == 0 ? 0 : i + 3 - leading;
    rows.size[place] = x.size(i);
    rows.stride[place] = x.stride(i);
  }
  return rows;
}

}  // namespace megatune::bind
