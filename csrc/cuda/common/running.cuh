// Sums that grow by a number at a time, of more numbers than one of fp32 should take.
#pragma once

#include "vec.cuh"

namespace megatune::cuda {

// N sums of numbers made from T. For fp32 what rounding drops goes into the next addition (Kahan, CACM 1965): else
// many rows, one after the other, would cost more than in PyTorch's tree of sums (tests/ops/test_numerics.py). Beside the error that numbers
// of 16 bits bring along it does not show. (A sum that has become infinite is NaN with the next number.)
template <class T, int N>
struct Running {
  static constexpr bool EXACT = sizeof(T) == 4;
  Vec<float, N> sums{};
  Vec<float, EXACT ? N : 1> excess{};

  __device__ void add(int i, float more) {
    if constexpr (EXACT) {
      more -= excess.at[i];
      const float after = sums.at[i] + more;
      excess.at[i] = (after - sums.at[i]) - more;
      sums.at[i] = after;
    } else {
      sums.at[i] += more;
    }
  }
};

}  // namespace megatune::cuda
