// The update of AdamW with moments in fp32.

#include "adamw_element.inl"

// Elements begin..begin + count; new weights to `weight` on, if wanted.
template <bool has_weight, class G, class W>
[[gnu::always_inline]] inline void adamw_block(const AdamW<G, W>& args, int64_t begin, int64_t count,
                                               W* __restrict weight) {
  adamw_loop<has_weight>(args.step, args.master + begin, args.exp_avg + begin, args.exp_avg_sq + begin,
                         args.grad + begin, weight, count);
}

constexpr int64_t ADAMW_BLOCK = 64;  // elements: few enough that asking for so many at once does not hold up the rest
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
      if (args.step.stream) {
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
