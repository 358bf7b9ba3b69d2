// Memory for a kernel's buffers, kept by each thread from one call to the next: asking the system for fresh pages costs
// more than the kernels.
#pragma once

#include <cstdint>

namespace megatune::cpu {

// At least `bytes` (a multiple of 64) on a 64-byte border, not initialised; `capacity`: what give_scratch must be told.
void* take_scratch(int64_t bytes, int64_t& capacity);
void give_scratch(void* data, int64_t capacity);

}  // namespace megatune::cpu
