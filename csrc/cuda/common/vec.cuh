// Elements in memory and in registers: 16 bytes at a time where addresses allow, else one by one; computed in fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "megatune/cuda.h"

namespace megatune::cuda {

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T at[N];
};

template <int N, class T>
__device__ inline Vec<T, N> load(const T* from) {
  return *reinterpret_cast<const Vec<T, N>*>(from);
}

template <class T, int N>
__device__ inline void store(T* to, const Vec<T, N>& values) {
  *reinterpret_cast<Vec<T, N>*>(to) = values;
}

// To global memory, as one store: left to itself the compiler may take a structure apart, and an int4 too, and store
// its elements one by one.
template <class T, int N>
__device__ inline void store_whole(T* to, const Vec<T, N>& values) {
  if constexpr (sizeof(values) == 16) {
    int4 words;
    memcpy(&words, &values, sizeof words);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words.x),
                 "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
  } else if constexpr (sizeof(values) == 8) {
    int2 words;
    memcpy(&words, &values, sizeof words);
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(words.x), "r"(words.y)
                 : "memory");
  } else {
    *reinterpret_cast<Vec<T, N>*>(to) = values;
  }
}

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }

template <class T>
__device__ inline T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) { return value; }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }
template <>
__device__ inline __half from_float<__half>(float value) { return __float2half_rn(value); }

// As fp32. Elements of 16 bits are taken as words of two: one by one, each would be held in a register of its own.
template <class T, int N>
__device__ inline Vec<float, N> widen(const Vec<T, N>& values) {
  Vec<float, N> result;
  if constexpr (N % 2 == 0 && sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      uint32_t word;
      memcpy(&word, values.at + i, sizeof word);
      if constexpr (std::is_same_v<T, __half>) {
        __half2 both;
        memcpy(&both, &word, sizeof both);
        const float2 wide = __half22float2(both);
        result.at[i] = wide.x, result.at[i + 1] = wide.y;
      } else {
        result.at[i] = __uint_as_float(word << 16), result.at[i + 1] = __uint_as_float(word & 0xffff0000u);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) result.at[i] = to_float(values.at[i]);
  }
  return result;
}

// Rounded to the nearest; elements of 16 bits two at a time, which is one instruction.
template <class T, int N>
__device__ inline Vec<T, N> narrow(const Vec<float, N>& values) {
  Vec<T, N> result;
  if constexpr (N % 2 == 0 && sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      if constexpr (std::is_same_v<T, __half>) {
        const __half2 both = __floats2half2_rn(values.at[i], values.at[i + 1]);
        memcpy(result.at + i, &both, sizeof both);
      } else {
        const __nv_bfloat162 both = __floats2bfloat162_rn(values.at[i], values.at[i + 1]);
        memcpy(result.at + i, &both, sizeof both);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) result.at[i] = from_float<T>(values.at[i]);
  }
  return result;
}

// N elements of a vector whose type is known at run time only (a weight: read again by every row, so from the cache).
template <int N>
__device__ inline Vec<float, N> load_any(const void* from, Type type, int64_t index) {
  Vec<float, N> result;
  if (type == Type::f32) {
    // Two loads of 16 bytes where eight elements are asked for.
    constexpr int step = N < 4 ? N : 4;
#pragma unroll
    for (int i = 0; i < N; i += step) {
      const auto part = load<step>(static_cast<const float*>(from) + index + i);
#pragma unroll
      for (int j = 0; j < step; ++j) result.at[i + j] = part.at[j];
    }
  } else if (type == Type::bf16) {
    result = widen(load<N>(static_cast<const __nv_bfloat16*>(from) + index));
  } else {
    result = widen(load<N>(static_cast<const __half*>(from) + index));
  }
  return result;
}

// Where a row of a strided tensor begins.
__host__ __device__ inline int64_t offset_of(const Rows& rows, int64_t row) {
  if (rows.size[1] == 1 && rows.size[2] == 1) return row * rows.stride[0];
  const int64_t inner = rows.size[1] * rows.size[2];
  int64_t token, head, part;
  if (row <= 0xffffffffll && inner <= 0xffffffffll) {  // division of 32 bits is several times cheaper
    const uint32_t rest = static_cast<uint32_t>(row) % static_cast<uint32_t>(inner);
    token = static_cast<uint32_t>(row) / static_cast<uint32_t>(inner);
    head = rest / static_cast<uint32_t>(rows.size[2]);
    part = rest % static_cast<uint32_t>(rows.size[2]);
  } else {
    token = row / inner;
    head = row % inner / rows.size[2];
    part = row % rows.size[2];
  }
  return token * rows.stride[0] + head * rows.stride[1] + part * rows.stride[2];
}

inline int64_t count(const Rows& rows) { return rows.size[0] * rows.size[1] * rows.size[2]; }

// The same rows with as few dimensions as possible, in front.
inline Rows collapsed(Rows rows) {
  for (int pass = 0; pass < 2; ++pass) {
    for (int i = 2; i > 0; --i) {
      if (rows.size[i - 1] == 1) {
        rows.size[i - 1] = rows.size[i], rows.stride[i - 1] = rows.stride[i], rows.size[i] = 1;
      } else if (rows.stride[i - 1] == rows.stride[i] * rows.size[i]) {
        rows.size[i - 1] *= rows.size[i], rows.stride[i - 1] = rows.stride[i], rows.size[i] = 1;
      }
    }
  }
  return rows;
}

inline bool aligned(std::initializer_list<const void*> pointers, uintptr_t bytes = 16) {
  for (const void* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) return false;
  return true;
}

// Whether every row begins at a multiple of `step` elements after the first.
inline bool in_steps(const Rows& rows, int64_t step) {
  for (int i = 0; i < 3; ++i)
    if (rows.size[i] > 1 && rows.stride[i] % step != 0) return false;
  return true;
}

// Calls body with a null pointer of the element type.
template <class Body>
auto with_type(Type type, Body&& body) {
  if (type == Type::f32) return body(static_cast<float*>(nullptr));
  if (type == Type::bf16) return body(static_cast<__nv_bfloat16*>(nullptr));
  return body(static_cast<__half*>(nullptr));
}

}  // namespace megatune::cuda
