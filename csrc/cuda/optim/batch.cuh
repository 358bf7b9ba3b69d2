// Many tensors in one launch: a table of them that travels as the kernel's argument, so that nothing is copied to the
// device and nothing must outlive the call. Each block does one chunk of one tensor.
#pragma once

#include <cstdint>

namespace megatune::cuda {

// `T` has a member n, its elements. Arguments may have 32,764 bytes (sm_70 and later, CUDA 12.1 and later).
template <class T, int CAPACITY>
struct Batch {
  T tensors[CAPACITY];
  int first[CAPACITY + 1];  // each tensor's first chunk; then the number of chunks
  int count;

  // Holds the tensors from `at` on that are not empty, as many as there is room for; where the next batch begins.
  int64_t fill(const T* all, int64_t at, int64_t end, int64_t chunk) {
    count = 0;
    first[0] = 0;
    for (; at < end && count < CAPACITY; ++at) {
      if (all[at].n == 0) continue;
      tensors[count] = all[at];
      first[count + 1] = first[count] + static_cast<int>((all[at].n + chunk - 1) / chunk);
      ++count;
    }
    return at;
  }

  __host__ __device__ int chunks() const { return first[count]; }

  // The tensor of this chunk.
  __device__ int holder(int chunk) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first[middle] <= chunk ? low : high) = middle;
    }
    return low;
  }
};

}  // namespace megatune::cuda
