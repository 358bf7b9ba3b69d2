// Vectors of 16 floats for the instruction set being compiled, and the functions the kernels need on them.
// No include guard: included once for each instruction set.

#define INLINE [[gnu::always_inline]] inline

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

using Full = std::integral_constant<int, 16>;  // number of elements of a whole vector, known when compiling

INLINE f32x16 splat(float value) { return value - f32x16{}; }

INLINE f32x16 widen(u16x16 bits) { return std::bit_cast<f32x16>(__builtin_convertvector(bits, u32x16) << 16); }

// Upper 16 bits rounded to nearest even; every NaN becomes the quiet one.
INLINE u32x16 round_to_bf16(f32x16 value) {
  const u32x16 bits = std::bit_cast<u32x16>(value);
  const u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const i32x16 nan = value != value;
  return nan ? u32x16{} + 0x7fc0u : rounded;
}

// load / store `count` <= 16 elements; what a partial load leaves out is zero.
template <class Count>
INLINE f32x16 load(const float* from, Count count) {
  f32x16 value{};
  if constexpr (std::is_same_v<Count, Full>) {
    __builtin_memcpy(&value, from, 64);
  } else {
    for (int i = 0; i < count; ++i) value[i] = from[i];
  }
  return value;
}

template <class Count>
INLINE f32x16 load(const bf16* from, Count count) {
  u16x16 bits{};
  if constexpr (std::is_same_v<Count, Full>) {
    __builtin_memcpy(&bits, from, 32);
  } else {
    for (int i = 0; i < count; ++i) bits[i] = from[i].bits;
  }
  return widen(bits);
}

template <class Count>
INLINE void store(float* to, f32x16 value, Count count) {
  if constexpr (std::is_same_v<Count, Full>) {
    __builtin_memcpy(to, &value, 64);
  } else {
    for (int i = 0; i < count; ++i) to[i] = value[i];
  }
}

template <class Count>
INLINE void store(bf16* to, f32x16 value, Count count) {
  const u16x16 bits = __builtin_convertvector(round_to_bf16(value), u16x16);
  if constexpr (std::is_same_v<Count, Full>) {
    __builtin_memcpy(to, &bits, 32);
  } else {
    for (int i = 0; i < count; ++i) to[i].bits = bits[i];
  }
}

// The value that storing as T and loading again would give.
INLINE f32x16 rounded(f32x16 value, const float*) { return value; }
INLINE f32x16 rounded(f32x16 value, const bf16*) { return std::bit_cast<f32x16>(round_to_bf16(value) << 16); }

// Calls body(first index, count) for 0..length in vectors; the last may be partial.
template <class Body>
INLINE void each_vector(int64_t length, Body&& body) {
  int64_t i = 0;
  for (; i + 16 <= length; i += 16) body(i, Full{});
  if (i < length) body(i, static_cast<int>(length - i));
}

// For reductions: lanes that a partial vector does not use become `rest`.
template <class Count>
INLINE f32x16 keep(f32x16 value, Count count, float rest) {
  if constexpr (!std::is_same_v<Count, Full>) {
    for (int i = count; i < 16; ++i) value[i] = rest;
  }
  return value;
}

INLINE float sum(f32x16 v) {
  float eight[8], four[4];
  for (int i = 0; i < 8; ++i) eight[i] = v[i] + v[i + 8];
  for (int i = 0; i < 4; ++i) four[i] = eight[i] + eight[i + 4];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

INLINE f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }

INLINE float max(f32x16 v) {
  float most = v[0];
  for (int i = 1; i < 16; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// exp with about one unit in the last place (polynomial of the Cephes library), of x kept in [-87.3, 88].
INLINE f32x16 exp(f32x16 x) {
  f32x16 r = x < -87.33f ? splat(-87.33f) : x;
  r = r > 88.0f ? splat(88.0f) : r;
  const f32x16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const f32x16 n = (r * 1.44269504f + magic) - magic;
  r = r - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  f32x16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * std::bit_cast<f32x16>((__builtin_convertvector(n, i32x16) + 127) << 23);
}

// 1 / x for 1 <= x < 1e37, faster than the division: a first guess from the bits, then three steps of Newton's method.
INLINE f32x16 reciprocal(f32x16 x) {
  f32x16 y = std::bit_cast<f32x16>(0x7ef311c7 - std::bit_cast<i32x16>(x));
  for (int i = 0; i < 3; ++i) y = y * (2.0f - x * y);
  return y;
}

// 1 / (1 + exp(-x)), and 1 minus that without cancellation; below -80 they stay at 2e-35 and 1.
INLINE f32x16 sigmoid(f32x16 x, f32x16& complement) {
  const f32x16 e = exp(x < -80.0f ? splat(80.0f) : -x);
  const f32x16 s = reciprocal(1.0f + e);
  complement = e * s;
  return s;
}

// 1 - 2 / (exp(2 |x|) + 1) with the sign of x; near 0, where that would lose places, a polynomial of the Cephes
// library. `slope`: the derivative, of which 1 - tanh^2 would keep few places far from 0.
INLINE f32x16 tanh(f32x16 x, f32x16& slope) {
  const f32x16 size = x < 0.0f ? -x : x, square = x * x;
  const f32x16 e = exp(size > 40.0f ? splat(80.0f) : size + size), rest = 1.0f / (1.0f + e), far = 1.0f - 2.0f * rest;
  f32x16 p = splat(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  slope = 4.0f * rest * (e * rest);
  return square < 0.390625f ? x + x * square * p : x < 0.0f ? -far : far;
}

INLINE f32x16 tanh(f32x16 x) {
  f32x16 slope;
  return tanh(x, slope);
}

// Walks over the rows of a tensor with strides, from row `begin` on.
struct Walk {
  const Rows& rows;
  int64_t a, b, c;
  Walk(const Rows& rows, int64_t begin) : rows(rows) {
    c = begin % rows.size[2];
    b = begin / rows.size[2] % rows.size[1];
    a = begin / rows.size[2] / rows.size[1];
  }
  int64_t offset() const { return a * rows.stride[0] + b * rows.stride[1] + c * rows.stride[2]; }
  void next() {
    if (++c < rows.size[2]) return;
    c = 0;
    if (++b < rows.size[1]) return;
    b = 0;
    ++a;
  }
};
