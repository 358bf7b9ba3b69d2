// loss = weight * (logsumexp(z) - (1 - smoothing) * z[label] - smoothing * mean(z) + z_loss * logsumexp(z)^2) for the
// capped logits z; the gradient takes the place of the logits.

// cap * tanh(x / cap), and its derivative.
INLINE f32x16 capped(f32x16 x, float cap) { return cap == 0.0f ? x : cap * tanh(x / cap); }

INLINE f32x16 capped(f32x16 x, float cap, f32x16& slope) {
  slope = splat(1.0f);
  if (cap == 0.0f) return x;
  return cap * tanh(x / cap, slope);
}

// Sum of term(first index, count) over a row: in fp32 for some columns, in fp64 of those sums, as there may be 10^5.
template <class Term>
INLINE float row_sum(int64_t length, Term&& term) {
  constexpr int64_t some = 1024;
  double total = 0.0;
  for (int64_t begin = 0; begin < length; begin += some) {
    f32x16 sums{};
    each_vector(length - begin < some ? length - begin : some, [&](int64_t i, auto n) { sums += term(begin + i, n); });
    total += sum(sums);
  }
  return static_cast<float>(total);
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
    const float total = row_sum(args.vocab, [&](int64_t i, auto n) {
      return keep(exp(capped(load(logits + i, n), cap) - top), n, 0.0f);
    });
    const float log_total = std::log(total), log_sum = top + log_total;
    f32x16 target_slope;
    const float target = capped(load(logits + label, 1), cap, target_slope)[0];
    float loss = log_total + (top - target);
    if (args.smoothing != 0.0f) {
      // Of what is below the target, so that the sum stays small.
      loss += even * row_sum(args.vocab, [&](int64_t i, auto n) {
        return keep(target - capped(load(logits + i, n), cap), n, 0.0f);
      });
    }
    args.loss[row] = weight * (loss + args.z_loss * log_sum * log_sum);
    if (!args.write_grad) continue;
    const float of_softmax = weight * (1.0f + 2.0f * args.z_loss * log_sum) / total, of_all = weight * even;
    each_vector(args.vocab, [&](int64_t i, auto n) {
      f32x16 slope;
      const f32x16 value = capped(load(logits + i, n), cap, slope);
      store(logits + i, (exp(value - top) * of_softmax - of_all) * slope, n);
    });
    // The label's own entry again, with full precision: probability - 1.
    const f32x16 own = exp(splat(target - top)) * of_softmax - (of_all + weight * (1.0f - args.smoothing));
    store(logits + label, own * target_slope, 1);
  }
}
