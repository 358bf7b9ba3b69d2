// The update of Lion (arXiv:2302.06675), element by element.

#include "adamw_element.inl"

template <bool has_weight, class G, class W>
[[gnu::always_inline]] inline void lion_range(const Lion<G, W>& args, int64_t begin, int64_t end) {
  float* __restrict master = args.master + begin;
  float* __restrict exp_avg = args.exp_avg + begin;
  const G* __restrict grad = args.grad + begin;
  W* __restrict weight = has_weight ? args.weight + begin : nullptr;
  const float scale = args.scale, keep = args.keep, lr = args.lr;
  const float beta1 = args.beta1, rest1 = args.rest1, beta2 = args.beta2, rest2 = args.rest2;
  for (int64_t i = 0; i < end - begin; ++i) {
    const float g = wide(grad[i]) * scale;
    const float c = beta1 * exp_avg[i] + rest1 * g;
    exp_avg[i] = beta2 * exp_avg[i] + rest2 * g;
    const float taken = c > 0.0f ? lr : c < 0.0f ? -lr : 0.0f;
    const float p = master[i] * keep - taken;
    master[i] = p;
    if constexpr (has_weight) narrow(p, weight[i]);
  }
}

template <class G, class W>
void lion(const Lion<G, W>& args, int64_t begin, int64_t end) {
  if (args.weight != nullptr) {
    lion_range<true>(args, begin, end);
  } else {
    lion_range<false>(args, begin, end);
  }
}
