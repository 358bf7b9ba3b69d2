// Philox4x32-10 (Salmon and others, SC11): four random words as a function of a counter and a key.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MEGATUNE_ANYWHERE __host__ __device__ __forceinline__
#else
#define MEGATUNE_ANYWHERE [[gnu::always_inline]] inline
#endif

namespace megatune {

struct Words {
  uint32_t at[4];
};

// counter: (block, step), 64 bits each.
MEGATUNE_ANYWHERE Words philox(uint64_t block, uint64_t step, uint64_t key) {
  uint32_t a = static_cast<uint32_t>(block), b = static_cast<uint32_t>(block >> 32);
  uint32_t c = static_cast<uint32_t>(step), d = static_cast<uint32_t>(step >> 32);
  uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = static_cast<uint64_t>(a) * 0xD2511F53u;
    const uint64_t second = static_cast<uint64_t>(c) * 0xCD9E8D57u;
    a = static_cast<uint32_t>(second >> 32) ^ b ^ low;
    b = static_cast<uint32_t>(second);
    c = static_cast<uint32_t>(first >> 32) ^ d ^ high;
    d = static_cast<uint32_t>(first);
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  return {{a, b, c, d}};
}

// The bits of an fp32 number -> those of one of the two bf16 beside it: the one farther from zero where the lower half
// and 16 random bits carry. What bf16 can hold stays; infinities stay; every NaN becomes the quiet one.
MEGATUNE_ANYWHERE uint16_t round_by(uint32_t bits, uint32_t random) {
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sum = magnitude >= 0x7f800000u ? bits : bits + random;
  return static_cast<uint16_t>(magnitude > 0x7f800000u ? 0x7fc0u : sum >> 16);
}

}  // namespace megatune
