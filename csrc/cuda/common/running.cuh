// Sums that grow by a number at a time, of more numbers than one of fp32 should take.
#pragma once

#include "vec.cuh"

namespace megatune::cuda {

// N sums for a result that has the precision of T. For fp32 what rounding drops goes into the next addition (Kahan,
// CACM 1965): else a hundred rows, one after the other, would cost twice what PyTorch's tree of sums costs. A result of
// 16 bits does not show it.
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
