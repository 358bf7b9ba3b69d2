#include "isa.h"

#include <cstdlib>

namespace megatune::cpu {

static Isa detect() {
#if defined(MEGATUNE_X86)
  const char* wish = std::getenv("MEGATUNE_CPU_ISA");
  if (wish != nullptr && std::strcmp(wish, "plain") == 0) return Isa::plain;
  const bool at_most_avx2 = wish != nullptr && std::strcmp(wish, "avx2") == 0;
  if (!at_most_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::plain;
}

Isa isa() {
  static const Isa found = detect();
  return found;
}

}  // namespace megatune::cpu
