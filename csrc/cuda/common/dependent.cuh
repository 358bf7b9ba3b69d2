// Launches that may begin before the one before them has ended: their blocks wait for it where they need what it wrote.
#pragma once

#include <cuda_runtime.h>

namespace megatune::cuda {

// The next launch may begin once every block of this one has come here or ended.
__device__ inline void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the launch before this one has ended and all that it wrote can be read.
__device__ inline void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// For a kernel that calls wait_for_previous(): begins early where the code that the device runs has that instruction.
// At least one of its blocks must call it, for the launch after it counts on all launches before it. shared: bytes of
// dynamic shared memory.
template <class... Parameters, class... Arguments>
int launch_early(void (*kernel)(Parameters...), unsigned blocks, dim3 threads, size_t shared, cudaStream_t stream,
                 const Arguments&... arguments) {
  cudaFuncAttributes code;
  if (const cudaError_t error = cudaFuncGetAttributes(&code, kernel)) return static_cast<int>(error);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks), config.blockDim = threads;
  config.dynamicSmemBytes = shared, config.stream = stream;
  config.attrs = &early, config.numAttrs = code.ptxVersion >= 90 ? 1 : 0;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace megatune::cuda
