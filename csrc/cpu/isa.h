// One kernel source, compiled for several instruction sets, chosen at run time.
//
// A kernel file `x.cpp` names its `x.inl` and includes each_isa.inl, which includes that once for each instruction set,
// each time in a namespace of its own and with the compiler's target switched. The .inl files are written with compiler
// vectors (simd.inl) or plain loops, so there is no intrinsic of one instruction set in them. attention.inl, with AMX
// tiles, is compiled for these alone. Every standard header must come before the first switch: code of the standard
// library compiled for AVX-512 could otherwise be linked into functions that run on any machine.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "megatune/cpu.h"

#if defined(__x86_64__)
#define MEGATUNE_X86 1
#if defined(__clang__)
#define MEGATUNE_TARGET_AVX2 _Pragma("clang attribute push(__attribute__((target(\"avx2,fma\"))), apply_to=function)")
#define MEGATUNE_TARGET_AVX512 \
  _Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512dq,avx512vl,fma\"))), apply_to=function)")
#define MEGATUNE_TARGET_AMX                                                                                    \
  _Pragma("clang attribute push("                                                                              \
          "__attribute__((target(\"avx512f,avx512bw,avx512dq,avx512vl,fma,amx-tile,amx-bf16\"))), apply_to=function)")
#define MEGATUNE_TARGET_END _Pragma("clang attribute pop")
#else
#define MEGATUNE_TARGET_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma\")")
#define MEGATUNE_TARGET_AVX512 \
  _Pragma("GCC push_options") _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,fma\")") \
      _Pragma("GCC target(\"prefer-vector-width=512\")")
#define MEGATUNE_TARGET_AMX \
  _Pragma("GCC push_options") _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,fma,amx-tile,amx-bf16\")") \
      _Pragma("GCC target(\"prefer-vector-width=512\")")
#define MEGATUNE_TARGET_END _Pragma("GCC pop_options")
#endif
#endif

#if defined(MEGATUNE_X86)
#define MEGATUNE_DISPATCH(kernel, ...)               \
  switch (isa()) {                                   \
    case Isa::avx512: return avx512::kernel(__VA_ARGS__); \
    case Isa::avx2: return avx2::kernel(__VA_ARGS__);     \
    default: return plain::kernel(__VA_ARGS__);           \
  }
#else
#define MEGATUNE_DISPATCH(kernel, ...) return plain::kernel(__VA_ARGS__);
#endif
