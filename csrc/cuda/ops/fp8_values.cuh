// What fp8.cuh has in registers: eight values of a row, largest magnitudes, scales and codes.
#pragma once

#include "../common/vec.cuh"

namespace megatune::cuda::fp8 {

constexpr int N = 8;  // values of a thread in a row
constexpr int TILE = 128;
constexpr int LANES = TILE / N;  // threads of a tile's row; each has N rows too
constexpr int THREADS = LANES * LANES;
constexpr int WARPS = THREADS / 32;

template <class T>
using Values = Vec<T, N>;

// Eight values in 16 byte loads, or one by one where addresses are odd. Whole words: taken element by element, each of
// 16 bits would be held in a register of its own.
template <class T>
__device__ Values<T> load_values(const T* from, bool vectors) {
  uint32_t words[2 * sizeof(T)];
  if (vectors) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) {
      const uint4 four = reinterpret_cast<const uint4*>(from)[i];
      words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
    }
  } else if constexpr (sizeof(T) == 2) {
    const auto* halves = reinterpret_cast<const unsigned short*>(from);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) words[i] = halves[2 * i] | uint32_t{halves[2 * i + 1]} << 16;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) words[i] = __float_as_uint(from[i]);
  }
  Values<T> values;
  memcpy(&values, words, sizeof values);
  return values;
}

template <class T>
__device__ Values<T> zeros() {
  Values<T> values;
  memset(&values, 0, sizeof values);
  return values;
}

template <class T>
bool in_vectors(const void* x, int64_t row_stride) {
  return row_stride % (16 / static_cast<int64_t>(sizeof(T))) == 0 && aligned({x});
}

template <class T>
struct PairOf {};
template <>
struct PairOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};
template <>
struct PairOf<__half> {
  using Type = __half2;
};

template <class T>
__device__ inline uint32_t word(const Values<T>& values, int i) {
  uint32_t two;
  memcpy(&two, values.at + 2 * i, sizeof two);
  return two;
}

// The larger magnitudes of two pairs, with any sign; NaN only where both are.
template <class T>
__device__ inline uint32_t larger(uint32_t one, uint32_t other) {
#if __CUDA_ARCH__ >= 860
  if constexpr (std::is_same_v<T, __half>) {
    asm("max.xorsign.abs.f16x2 %0, %0, %1;" : "+r"(one) : "r"(other));
  } else {
    asm("max.xorsign.abs.bf16x2 %0, %0, %1;" : "+r"(one) : "r"(other));
  }
  return one;
#else
  typename PairOf<T>::Type pairs[2];
  one &= 0x7fff7fffu, other &= 0x7fff7fffu;
  memcpy(pairs, &one, sizeof one), memcpy(pairs + 1, &other, sizeof other);
  pairs[0] = __hmax2(pairs[0], pairs[1]);
  memcpy(&one, pairs, sizeof one);
  return one;
#endif
}

// Magnitudes of a pair, NaN as 0.
template <class T>
__device__ inline float2 magnitudes(uint32_t pair) {
  typename PairOf<T>::Type two;
  memcpy(&two, &pair, sizeof two);
  return {fmaxf(0.0f, fabsf(to_float(two.x))), fmaxf(0.0f, fabsf(to_float(two.y)))};
}

// The largest magnitudes so far of eight columns; NaN is left out. Exact in T.
template <class T>
struct Peaks {
  uint32_t at[N / 2] = {};

  __device__ void add(const Values<T>& values) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) at[i] = larger<T>(at[i], word(values, i));
  }
  __device__ void join_lane(int other) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) at[i] = larger<T>(at[i], __shfl_xor_sync(0xffffffffu, at[i], other));
  }
  __device__ float of(int column) const {
    const float2 two = magnitudes<T>(at[column / 2]);
    return column % 2 == 0 ? two.x : two.y;
  }
  __device__ float largest() const {
    const float2 two = magnitudes<T>(larger<T>(larger<T>(at[0], at[1]), larger<T>(at[2], at[3])));
    return fmaxf(two.x, two.y);
  }
};

template <>
struct Peaks<float> {
  float at[N] = {};

  __device__ void add(const Values<float>& values) {
#pragma unroll
    for (int i = 0; i < N; ++i) at[i] = fmaxf(at[i], fabsf(values.at[i]));
  }
  __device__ void join_lane(int other) {
#pragma unroll
    for (int i = 0; i < N; ++i) at[i] = fmaxf(at[i], __shfl_xor_sync(0xffffffffu, at[i], other));
  }
  __device__ float of(int column) const { return at[column]; }
  __device__ float largest() const {
    float peak = at[0];
#pragma unroll
    for (int i = 1; i < N; ++i) peak = fmaxf(peak, at[i]);
    return peak;
  }
};

// Largest magnitudes of eight rows, of which each thread has eight columns.
template <class T>
__device__ void row_peaks(const Values<T> (&values)[N], float (&peaks)[N]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      uint32_t rows[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const auto& row = values[i + k];
        rows[k] = larger<T>(larger<T>(word(row, 0), word(row, 1)), larger<T>(word(row, 2), word(row, 3)));
      }
      // Both rows in one word each: what is in the low halves, what is in the high ones.
      const float2 two =
          magnitudes<T>(larger<T>(__byte_perm(rows[0], rows[1], 0x5410), __byte_perm(rows[0], rows[1], 0x7632)));
      peaks[i] = two.x, peaks[i + 1] = two.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      Peaks<T> of_row;
      of_row.add(values[i]);
      peaks[i] = of_row.largest();
    }
  }
}

struct Larger {
  __device__ float operator()(float left, float right) const { return fmaxf(left, right); }
};

// Of the eight values of each of COUNT neighbouring lanes what `join` makes of them, the largest or another, one by one:
// value l / (COUNT / 8) for lane l.
template <int COUNT, class Join = Larger>
__device__ float spread(const float (&values)[N], int lane, Join join = {}) {
  float kept[N];
#pragma unroll
  for (int i = 0; i < N; ++i) kept[i] = values[i];
  int distance = COUNT / 2;
#pragma unroll
  for (int left = N / 2; left > 0; left /= 2, distance /= 2) {
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < left; ++i) {
      const float sent = upper ? kept[i] : kept[i + left];
      kept[i] = join(upper ? kept[i + left] : kept[i], __shfl_xor_sync(0xffffffffu, sent, distance));
    }
  }
#pragma unroll
  for (; distance > 0; distance /= 2) kept[0] = join(kept[0], __shfl_xor_sync(0xffffffffu, kept[0], distance));
  return kept[0];
}

__device__ inline float scale_of(float peak, bool e5m2) {
  return peak > 0x1p-100f ? peak * (e5m2 ? 1.0f / 57344.0f : 1.0f / 448.0f) : 1.0f;
}

// Two codes, that of `low` in the low byte.
__device__ inline uint32_t two_codes(float low, float high, bool e5m2) {
#if __CUDA_ARCH__ >= 890
  uint16_t codes;
  if (e5m2) {
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  }
  return codes;
#else
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float value = i == 0 ? low : high;
    const int bits = e5m2 ? 2 : 3, bias = e5m2 ? 15 : 7, cut = 23 - bits;
    const float least = e5m2 ? 0x1p-14f : 0x1p-6f;  // below it numbers are evenly spaced
    const float magnitude = fminf(fabsf(value), e5m2 ? 57344.0f : 448.0f);
    uint32_t code;
    if (value != value) {
      code = 0x7f;
    } else if (magnitude < least) {
      code = __float2int_rn(magnitude * ((1 << bits) / least));
    } else {
      const uint32_t word = __float_as_uint(magnitude);
      code = ((word + (1u << (cut - 1)) - 1 + (word >> cut & 1)) >> cut) - ((127 - bias) << bits);
    }
    if (value == value) code |= __float_as_uint(value) >> 24 & 0x80;
    codes |= code << 8 * i;
  }
  return codes;
#endif
}

// Four e4m3 codes, that of the first number lowest.
__device__ inline uint32_t four_codes(float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 890
  uint32_t codes;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"  // merged by the second conversion
      : "=r"(codes)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return codes;
#else
  return two_codes(a, b, false) | two_codes(c, d, false) << 16;
#endif
}

__device__ inline uint2 eight_codes(const float (&values)[N], bool e5m2) {
  uint2 codes;
  codes.x = two_codes(values[0], values[1], e5m2) | two_codes(values[2], values[3], e5m2) << 16;
  codes.y = two_codes(values[4], values[5], e5m2) | two_codes(values[6], values[7], e5m2) << 16;
  return codes;
}

template <class T>
__device__ uint2 row_codes(const Values<T>& values, float inverse, bool e5m2) {
  float scaled[N];
  const auto wide = widen(values);
#pragma unroll
  for (int i = 0; i < N; ++i) scaled[i] = wide.at[i] * inverse;
  return eight_codes(scaled, e5m2);
}

// Codes of a column of eight rows, that of the first one lowest.
template <class T>
__device__ uint2 column_codes(const Values<T> (&values)[N], int column, float inverse, bool e5m2) {
  float scaled[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    // Out of the word that holds it: taken one by one, each element would have a register of its own.
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const uint32_t two = word(values[i], column / 2);
      scaled[i] = __uint_as_float(column % 2 == 0 ? two << 16 : two & 0xffff0000u) * inverse;
    } else {
      scaled[i] = to_float(values[i].at[column]) * inverse;
    }
  }
  return eight_codes(scaled, e5m2);
}

__device__ inline void store_codes(uint8_t* to, uint2 codes) { *reinterpret_cast<uint2*>(to) = codes; }
__device__ inline void store_codes(uint8_t* to, uint4 codes) { *reinterpret_cast<uint4*>(to) = codes; }

}  // namespace megatune::cuda::fp8
