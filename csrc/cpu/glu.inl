// activation(gate) * up on interleaved pairs (gate, up), and its gradients.

template <class Count>
INLINE void load_pairs(const float* from, Count count, f32x16& gate, f32x16& up) {
  float pairs[32] = {};
  std::memcpy(pairs, from, 2 * count * sizeof(float));
  f32x16 low, high;
  std::memcpy(&low, pairs, 64);
  std::memcpy(&high, pairs + 16, 64);
  gate = __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  up = __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

template <class Count>
INLINE void load_pairs(const bf16* from, Count count, f32x16& gate, f32x16& up) {
  u32x16 pairs{};  // one bf16 pair in each 32 bits: gate below, up above (little endian)
  std::memcpy(&pairs, from, 2 * count * sizeof(bf16));
  gate = std::bit_cast<f32x16>(pairs << 16);
  up = std::bit_cast<f32x16>(pairs & 0xffff0000u);
}

template <class Count>
INLINE void store_pairs(float* to, f32x16 gate, f32x16 up, Count count) {
  f32x16 pairs[2];
  pairs[0] = __builtin_shufflevector(gate, up, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  pairs[1] = __builtin_shufflevector(gate, up, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  std::memcpy(to, pairs, 2 * count * sizeof(float));
}

template <class Count>
INLINE void store_pairs(bf16* to, f32x16 gate, f32x16 up, Count count) {
  const u32x16 pairs = round_to_bf16(gate) | (round_to_bf16(up) << 16);
  std::memcpy(to, &pairs, 2 * count * sizeof(bf16));
}

// GELU(x) = x * Phi(x) through the error function, lane by lane: few models use it.
INLINE void gelu(f32x16 x, f32x16& value, f32x16& slope) {
  for (int i = 0; i < 16; ++i) {
    const float phi = 0.5f * std::erfc(-x[i] * 0.70710678f);
    value[i] = x[i] * phi;
    slope[i] = phi + x[i] * 0.39894228f * std::exp(-0.5f * x[i] * x[i]);
  }
}

// The activation and its derivative.
template <Activation activation>
INLINE void activate(f32x16 x, f32x16& value, f32x16& slope) {
  if constexpr (activation == Activation::silu) {
    f32x16 complement;
    const f32x16 s = sigmoid(x, complement);
    value = x * s;
    slope = s + value * complement;
  } else if constexpr (activation == Activation::gelu_tanh) {
    // 0.5 * (1 + tanh(u)) = sigmoid(2u) with u = sqrt(2 / pi) * (x + 0.044715 x^3)
    f32x16 complement;
    const f32x16 s = sigmoid(1.59576912f * (x + 0.044715f * x * x * x), complement);
    value = x * s;
    slope = s + value * complement * 1.59576912f * (1.0f + 0.134145f * x * x);
  } else {
    gelu(x, value, slope);
  }
}

template <Activation activation, class T>
INLINE void glu_rows(const Glu<T>& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* gate_up = args.gate_up + row * args.row_stride;
    T* y = args.y + row * args.width;
    each_vector(args.width, [&](int64_t i, auto n) {
      f32x16 gate, up, value, slope;
      load_pairs(gate_up + 2 * i, n, gate, up);
      activate<activation>(gate, value, slope);
      store(y + i, value * up, n);
    });
  }
}

template <Activation activation, class T>
INLINE void glu_backward_rows(const GluBackward<T>& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* gate_up = args.gate_up + row * args.row_stride;
    const T* grad = args.grad + row * args.width;
    T* grad_gate_up = args.grad_gate_up + row * 2 * args.width;
    each_vector(args.width, [&](int64_t i, auto n) {
      f32x16 gate, up, value, slope;
      load_pairs(gate_up + 2 * i, n, gate, up);
      activate<activation>(gate, value, slope);
      const f32x16 g = load(grad + i, n);
      store_pairs(grad_gate_up + 2 * i, g * up * slope, g * value, n);
    });
  }
}

template <class T>
void glu(const Glu<T>& args, int64_t begin, int64_t end) {
  switch (args.activation) {
    case Activation::silu: return glu_rows<Activation::silu>(args, begin, end);
    case Activation::gelu: return glu_rows<Activation::gelu>(args, begin, end);
    case Activation::gelu_tanh: return glu_rows<Activation::gelu_tanh>(args, begin, end);
  }
}

template <class T>
void glu_backward(const GluBackward<T>& args, int64_t begin, int64_t end) {
  switch (args.activation) {
    case Activation::silu: return glu_backward_rows<Activation::silu>(args, begin, end);
    case Activation::gelu: return glu_backward_rows<Activation::gelu>(args, begin, end);
    case Activation::gelu_tanh: return glu_backward_rows<Activation::gelu_tanh>(args, begin, end);
  }
}
