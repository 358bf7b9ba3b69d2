// What the optimizers share: gradients and weights of either dtype, and the update of AdamW (arXiv:1711.05101), element
// by element. The compiler vectorises the plain loops. Included by the kernels, once for each instruction set.

[[gnu::always_inline]] inline float wide(float value) { return value; }
[[gnu::always_inline]] inline float wide(bf16 value) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(value.bits) << 16);
}

[[gnu::always_inline]] inline void narrow(float value, float& to) { to = value; }
// Rounded to nearest even; every NaN becomes the quiet one.
[[gnu::always_inline]] inline void narrow(float value, bf16& to) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

// `count` elements, in place; the new masters go to `weight` too, if wanted.
template <bool has_weight, class G, class W>
[[gnu::always_inline]] inline void adamw_loop(const AdamWStep& step, float* __restrict master,
                                              float* __restrict exp_avg, float* __restrict exp_avg_sq,
                                              const G* __restrict grad, W* __restrict weight, int64_t count) {
  const float scale = step.scale, keep = step.keep, beta1 = step.beta1, beta2 = step.beta2;
  const float rest1 = step.rest1, rest2 = step.rest2, eps = step.eps;
  const float step_size = step.step_size, root = step.root;
  for (int64_t i = 0; i < count; ++i) {
    const float g = wide(grad[i]) * scale;
    const float m = beta1 * exp_avg[i] + rest1 * g;
    const float v = beta2 * exp_avg_sq[i] + rest2 * (g * g);
    const float p = master[i] * keep - step_size * m / (__builtin_sqrtf(v) * root + eps);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    master[i] = p;
    if constexpr (has_weight) narrow(p, weight[i]);
  }
}
