// The update of AdamW (arXiv:1711.05101), element by element. The compiler vectorises the plain loops.

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

// Elements begin..begin + count; new weights to `weight` on, if wanted.
template <bool has_weight, class G, class W>
[[gnu::always_inline]] inline void adamw_block(const AdamW<G, W>& args, int64_t begin, int64_t count,
                                               W* __restrict weight) {
  float* __restrict master = args.master + begin;
  float* __restrict exp_avg = args.exp_avg + begin;
  float* __restrict exp_avg_sq = args.exp_avg_sq + begin;
  const G* __restrict grad = args.grad + begin;
  const float scale = args.scale, keep = args.keep, beta1 = args.beta1, beta2 = args.beta2;
  const float rest1 = args.rest1, rest2 = args.rest2, eps = args.eps;
  const float step_size = args.step_size, root = args.root;
  for (int64_t i = 0; i < count; ++i) {
    const float g = wide(grad[i]) * scale;
    const float m = beta1 * exp_avg[i] + rest1 * g;
    const float v = beta2 * exp_avg_sq[i] + rest2 * (g * g);
    const float p = master[i] * keep - step_size * m / (__builtin_sqrtf(v) / root + eps);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    master[i] = p;
    if constexpr (has_weight) narrow(p, weight[i]);
  }
}

constexpr int64_t ADAMW_BLOCK = 256;  // elements
constexpr int64_t ADAMW_AHEAD = 1024;  // elements: how far ahead memory is asked for

template <class T>
[[gnu::always_inline]] inline void ask_for(const T* from) {
  for (size_t byte = 0; byte < ADAMW_BLOCK * sizeof(T); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(from) + byte, 0, 3);
}

// 64-byte aligned, a multiple of 64 bytes.
[[gnu::always_inline]] inline void stream_out(void* to, const void* from, size_t bytes) {
#if defined(MEGATUNE_X86)
  for (size_t at = 0; at < bytes; at += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(static_cast<char*>(to) + at),
                     _mm_load_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(from) + at)));
#else
  __builtin_memcpy(to, from, bytes);
#endif
}

template <bool has_weight, class G, class W>
[[gnu::always_inline]] inline void adamw_range(const AdamW<G, W>& args, int64_t begin, int64_t end) {
  alignas(64) W fresh[ADAMW_BLOCK];
  int64_t i = begin;
  if constexpr (has_weight) {
    // Up to the weights' first cache line border.
    const int64_t off = static_cast<int64_t>(reinterpret_cast<uintptr_t>(args.weight + begin) % 64 / sizeof(W));
    const int64_t lead = off == 0 ? 0 : static_cast<int64_t>(64 / sizeof(W)) - off;
    i += lead < end - begin ? lead : end - begin;
    adamw_block<true>(args, begin, i - begin, args.weight + begin);
  }
  for (; i + ADAMW_BLOCK <= end; i += ADAMW_BLOCK) {
    if (i + ADAMW_AHEAD + ADAMW_BLOCK <= end) {
      ask_for(args.master + i + ADAMW_AHEAD);
      ask_for(args.exp_avg + i + ADAMW_AHEAD);
      ask_for(args.exp_avg_sq + i + ADAMW_AHEAD);
      ask_for(args.grad + i + ADAMW_AHEAD);
    }
    if constexpr (has_weight) {
      if (args.stream) {
        adamw_block<true>(args, i, ADAMW_BLOCK, fresh);
        stream_out(args.weight + i, fresh, sizeof fresh);
      } else {
        adamw_block<true>(args, i, ADAMW_BLOCK, args.weight + i);
      }
    } else {
      adamw_block<false>(args, i, ADAMW_BLOCK, static_cast<W*>(nullptr));
    }
  }
  adamw_block<has_weight>(args, i, end - i, has_weight ? args.weight + i : nullptr);
}

template <class G, class W>
void adamw(const AdamW<G, W>& args, int64_t begin, int64_t end) {
  if (args.weight != nullptr) {
    adamw_range<true>(args, begin, end);
  } else {
    adamw_range<false>(args, begin, end);
  }
}
