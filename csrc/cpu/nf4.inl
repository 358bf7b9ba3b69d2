// No include guard: included once for each instruction set.

typedef uint8_t u8x16 __attribute__((vector_size(16)));

constexpr float NF4_CODE[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// table[index], element by element: one instruction on AVX-512.
INLINE f32x16 look_up(f32x16 table, i32x16 index) {
#if defined(__clang__)
  f32x16 found;
  for (int i = 0; i < 16; ++i) found[i] = table[index[i]];
  return found;
#else
  return __builtin_shuffle(table, index);
#endif
}

// a0 b0 a1 b1 ..: the first or the second half of it.
INLINE f32x16 interleave(f32x16 a, f32x16 b, int half) {
#if defined(__clang__)
  return half ? __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
              : __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#else
  const i32x16 places = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  return __builtin_shuffle(a, b, places + 8 * half);
#endif
}

template <class T>
void nf4_dense(const Nf4Dense<T>& args, int64_t begin, int64_t end) {
  const f32x16 code = load(NF4_CODE, Full{});
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * NF4_BLOCK;
    const f32x16 table = code * args.scales[block];
    const uint8_t* from = args.packed + first / 2;
    T* to = args.dense + first;
    if (first + NF4_BLOCK <= args.size) {
      for (int part = 0; part < 2; ++part, from += 16, to += 32) {
        u8x16 bytes;
        __builtin_memcpy(&bytes, from, 16);
        const f32x16 even = look_up(table, __builtin_convertvector(bytes >> 4, i32x16));
        const f32x16 odd = look_up(table, __builtin_convertvector(bytes & 15, i32x16));
        store(to, interleave(even, odd, 0), Full{});
        store(to + 16, interleave(even, odd, 1), Full{});
      }
      continue;
    }
    for (int64_t i = 0; first + i < args.size; ++i) {
      const int number = i % 2 ? from[i / 2] & 15 : from[i / 2] >> 4;
      store(to + i, splat(table[number]), 1);
    }
  }
}
