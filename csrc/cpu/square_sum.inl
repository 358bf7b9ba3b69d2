// Sum of the squares of `length` elements, in double: each square is exact there, so that the sum of any cut of the same
// numbers is the same to about 1e-15.

typedef float f32x8 __attribute__((vector_size(32)));
typedef double f64x8 __attribute__((vector_size(64)));

template <class T>
double square_sum(const T* x, int64_t length) {
  f64x8 low{}, high{};
  each_vector(length, [&](int64_t i, auto count) {
    const f32x16 v = load(x + i, count);
    f32x8 halves[2];
    __builtin_memcpy(halves, &v, 64);
    const f64x8 a = __builtin_convertvector(halves[0], f64x8), b = __builtin_convertvector(halves[1], f64x8);
    low += a * a;
    high += b * b;
  });
  low += high;
  double sum = 0.0;
  for (int i = 0; i < 8; ++i) sum += low[i];
  return sum;
}
