// AdamW on bf16 parameters, rounded by random bits.

#include "adamw_element.inl"

constexpr int64_t BF16_BLOCK = 256;  // elements whose masters are in fp32 at a time

template <class G>
void adamw_bf16(const AdamWBf16<G>& args, int64_t begin, int64_t end) {
  // One block more than full ones need: `first` may stand anywhere in its block of eight.
  constexpr int64_t blocks = BF16_BLOCK / 8 + 1;
  alignas(64) float wider[BF16_BLOCK];
  alignas(64) uint32_t words[blocks * 4];
  alignas(64) uint16_t random[blocks * 8];
  for (int64_t at = begin, count; at < end; at += count) {
    // Within one row: what the tensor holds of it is a run of the parameter.
    const int64_t row = at / args.width, column = at % args.width;
    const int64_t left = end - at < args.width - column ? end - at : args.width - column;
    count = left < BF16_BLOCK ? left : BF16_BLOCK;
    bf16* const master = args.master + at;
    for (int64_t i = 0; i < count; ++i) wider[i] = wide(master[i]);
    adamw_loop<false>(args.step, wider, args.exp_avg + at, args.exp_avg_sq + at, args.grad + at,
                      static_cast<float*>(nullptr), count);
    const uint64_t index = static_cast<uint64_t>(args.first + row * args.stride + column);
    for (int64_t j = 0; j < blocks; ++j) {
      const Words four = philox(index / 8 + static_cast<uint64_t>(j), args.number, args.key);
      for (int k = 0; k < 4; ++k) words[j * 4 + k] = four.at[k];
    }
    for (int64_t i = 0; i < blocks * 4; ++i) {
      random[2 * i] = static_cast<uint16_t>(words[i]);
      random[2 * i + 1] = static_cast<uint16_t>(words[i] >> 16);
    }
    const uint16_t* mine = random + index % 8;
    for (int64_t i = 0; i < count; ++i)
      master[i].bits = round_by(__builtin_bit_cast(uint32_t, wider[i]), mine[i]);
  }
}
