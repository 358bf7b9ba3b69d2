// Pairs (x[i], x[i + half]) of each head turned by the token's angle; `inverse` turns back (the gradient).

template <class T>
void rope(const Rope<T>& args, int64_t begin, int64_t end) {
  const int64_t half = args.half;
  const int64_t heads = args.rows.size[1] * args.rows.size[2];
  const float sign = args.inverse ? -1.0f : 1.0f;
  for (int64_t token = begin; token < end; ++token) {
    const float* cos = args.cos + token * half;
    const float* sin = args.sin + token * half;
    Walk walk(args.rows, token * heads);
    for (int64_t head = 0; head < heads; ++head, walk.next()) {
      const T* x = args.x + walk.offset();
      T* y = args.y + (token * heads + head) * args.width;
      each_vector(half, [&](int64_t i, auto n) {
        const f32x16 c = load(cos + i, n), s = load(sin + i, n) * sign;
        const f32x16 first = load(x + i, n), second = load(x + half + i, n);
        store(y + i, first * c - second * s, n);
        store(y + half + i, second * c + first * s, n);
      });
      std::memcpy(y + 2 * half, x + 2 * half, (args.width - 2 * half) * sizeof(T));
    }
  }
}
