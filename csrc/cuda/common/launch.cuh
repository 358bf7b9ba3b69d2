// Grids and errors of launches.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace megatune::cuda {

// Blocks for `items` of which each block takes `each`; kernels loop over what is beyond the grid.
inline unsigned grid(int64_t items, int64_t each) {
  return static_cast<unsigned>(std::min<int64_t>((items + each - 1) / each, 1 << 30));
}

// Multiprocessors of the current device; asked once for each device.
inline int multiprocessors() {
  constexpr int known = 64;
  static std::atomic<int> counts[known];
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (device < known) count = counts[device].load(std::memory_order_relaxed);
  if (count == 0) {
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
    if (device < known) counts[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

// The error of the launch just made.
inline int launched() { return static_cast<int>(cudaGetLastError()); }

}  // namespace megatune::cuda
