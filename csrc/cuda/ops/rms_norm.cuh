// What both directions of the root-mean-square norm share.
#pragma once

#include "../common/vec.cuh"

#include <algorithm>

namespace megatune::cuda {

constexpr int SHORT_THREADS = 256;  // of a block that has several rows

// Where rows begin: of two dimensions at most and fewer than 2^31, else `inner` is 0. The division is a product (Granlund
// and Montgomery, PLDI 1994).
struct Starts {
  int64_t outer_stride, inner_stride;
  uint32_t inner, multiplier, shift;

  __device__ int64_t operator()(uint32_t row) const {
    const uint32_t outer = (__umulhi(multiplier, row) + row) >> shift;
    return outer * outer_stride + (row - outer * inner) * inner_stride;
  }
};

// Of rows that are collapsed.
inline Starts starts_of(const Rows& rows) {
  if (rows.size[2] != 1 || count(rows) > 0x7fffffff) return {};
  const uint64_t inner = static_cast<uint64_t>(rows.size[1]);
  uint32_t shift = 0;
  while ((uint64_t{1} << shift) < inner) ++shift;
  const uint64_t multiplier = ((uint64_t{1} << 32) * ((uint64_t{1} << shift) - inner)) / inner + 1;
  return {rows.stride[0], rows.stride[1], static_cast<uint32_t>(inner), static_cast<uint32_t>(multiplier), shift};
}

// For `kept` vectors a thread. few: of a short row as few threads as can keep it, not as many as it has vectors.
inline dim3 block_of(int64_t vectors, int kept, int most, bool few = false) {
  if (vectors <= 32 * kept) {
    unsigned lanes = 1;
    while (lanes < 32 && lanes * (few ? kept : 1) < vectors) lanes *= 2;
    return dim3(lanes, SHORT_THREADS / lanes);
  }
  return dim3(static_cast<unsigned>(std::min<int64_t>((vectors + kept * 32 - 1) / (kept * 32) * 32, most)));
}

}  // namespace megatune::cuda
