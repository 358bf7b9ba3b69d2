// loss = weight * (logsumexp(z) - (1 - smoothing) * z[label] - smoothing * mean(z) + z_loss * logsumexp(z)^2) for the
// capped logits z; the gradient takes the place of the logits.

// cap * tanh(x / cap), and its derivative 1 - tanh^2.
INLINE f32x16 capped(f32x16 x, float cap) { return cap == 0.0f ? x : cap * tanh(x / cap); }

INLINE f32x16 cap_slope(f32x16 value, float cap) {
  const f32x16 t = value / cap;
  return 1.0f - t * t;
}

template <class T>
void cross_entropy(const CrossEntropy<T>& args, int64_t begin, int64_t end) {
  const float cap = args.softcap, even = args.smoothing / static_cast<float>(args.vocab);
  for (int64_t row = begin; row < end; ++row) {
    T* logits = args.logits + row * args.row_stride;
    const int64_t label = args.labels[row];
    if (label == args.ignore) {
      args.loss[row] = 0.0f;
      if (args.write_grad) std::memset(static_cast<void*>(logits), 0, args.vocab * sizeof(T));
      continue;
    }
    const float weight = args.weights == nullptr ? 1.0f : args.weights[row];
    f32x16 most = splat(-std::numeric_limits<float>::infinity());
    each_vector(args.vocab, [&](int64_t i, auto n) {
      most = max(most, keep(load(logits + i, n), n, -std::numeric_limits<float>::infinity()));
    });
    const float top = capped(splat(max(most)), cap)[0];  // the cap is monotonic
    f32x16 sums{};
    each_vector(args.vocab, [&](int64_t i, auto n) {
      sums += keep(exp(capped(load(logits + i, n), cap) - top), n, 0.0f);
    });
    const float total = sum(sums), log_total = std::log(total), log_sum = top + log_total;
    const float target = capped(load(logits + label, 1), cap)[0];
    float loss = log_total + (top - target);
    if (args.smoothing != 0.0f) {
      f32x16 below{};  // of the target, so that the sum stays small
      each_vector(args.vocab, [&](int64_t i, auto n) {
        below += keep(target - capped(load(logits + i, n), cap), n, 0.0f);
      });
      loss += even * sum(below);
    }
    args.loss[row] = weight * (loss + args.z_loss * log_sum * log_sum);
    if (!args.write_grad) continue;
    const float of_softmax = weight * (1.0f + 2.0f * args.z_loss * log_sum) / total, of_all = weight * even;
    each_vector(args.vocab, [&](int64_t i, auto n) {
      const f32x16 value = capped(load(logits + i, n), cap);
      f32x16 grad = exp(value - top) * of_softmax - of_all;
      if (cap != 0.0f) grad *= cap_slope(value, cap);
      store(logits + i, grad, n);
    });
    // The label's own entry again, with full precision: probability - 1.
    f32x16 grad = exp(splat(target - top)) * of_softmax - (of_all + weight * (1.0f - args.smoothing));
    if (cap != 0.0f) grad *= cap_slope(splat(target), cap);
    store(logits + label, grad, 1);
  }
}
