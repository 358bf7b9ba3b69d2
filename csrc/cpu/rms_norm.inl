// y = x * rsqrt(mean(x^2) + eps) * scale, and its gradients.

template <class T>
void rms_norm(const RmsNorm<T>& args, int64_t begin, int64_t end) {
  const float* scale = args.scale;
  Walk walk(args.rows, begin);
  for (int64_t row = begin; row < end; ++row, walk.next()) {
    const T* x = args.x + walk.offset();
    T* y = args.y + row * args.width;
    f32x16 squares{};
    each_vector(args.width, [&](int64_t i, auto n) {
      const f32x16 v = load(x + i, n);
      squares += v * v;
    });
    const float rstd = 1.0f / std::sqrt(sum(squares) / static_cast<float>(args.width) + args.eps);
    args.rstd[row] = rstd;
    each_vector(args.width, [&](int64_t i, auto n) {
      f32x16 normed = load(x + i, n) * rstd;
      if (args.round_first) normed = rounded(normed, x);
      store(y + i, normed * load(scale + i, n), n);
    });
  }
}

// With h = x * rstd and g = grad * scale: grad_x = rstd * (g - h * mean(g * h)), grad_weight = sum of grad * h, in fp32
// for a few rows and in fp64 of those sums: thousands of fp32 numbers, added up one after the other, would be farther
// off than PyTorch's tree of sums (tests/ops/test_numerics.py).
template <class T>
void rms_norm_backward(const RmsNormBackward<T>& args, int64_t begin, int64_t end) {
  constexpr int64_t few = 8;
  const float* scale = args.scale;
  float* sums = args.sums;
  Walk walk(args.rows, begin);
  for (int64_t row = begin; row < end; ++row, walk.next()) {
    const T* x = args.x + walk.offset();
    const T* grad = args.grad + row * args.width;
    T* grad_x = args.grad_x + row * args.width;
    const float rstd = args.rstd[row];
    f32x16 products{};
    each_vector(args.width, [&](int64_t i, auto n) {
      products += load(grad + i, n) * load(scale + i, n) * load(x + i, n);
    });
    const float mean = sum(products) * rstd / static_cast<float>(args.width);
    each_vector(args.width, [&](int64_t i, auto n) {
      const f32x16 normed = load(x + i, n) * rstd;
      const f32x16 g = load(grad + i, n);
      store(grad_x + i, (g * load(scale + i, n) - normed * mean) * rstd, n);
      if (sums != nullptr) store(sums + i, load(sums + i, n) + g * normed, n);
    });
    if (sums == nullptr || ((row + 1 - begin) % few != 0 && row + 1 != end)) continue;
    for (int64_t i = 0; i < args.width; ++i) args.grad_weight[i] += sums[i], sums[i] = 0.0f;
  }
}
