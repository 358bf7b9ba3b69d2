// What the binding asks about the device.

#include <cuda_runtime.h>

#include "megatune/cuda.h"

namespace megatune::cuda {

namespace {
__global__ void probe_kernel() {}
}  // namespace

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int device_error() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  cudaGetLastError();  // it is reported here; the next launch must not find it
  return static_cast<int>(error);
}

}  // namespace megatune::cuda
