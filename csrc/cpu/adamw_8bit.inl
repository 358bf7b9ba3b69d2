// AdamW with moments in 8 bits: a block of 256 elements is in the cache from its old codes to the new ones.

#include "adamw_element.inl"

// codes::Map with what vectors can gather: a value for each code, and places of 32 bits.
template <bool is_signed>
struct Lookup {
  using Map = codes::Map<is_signed>;
  float values[256];
  float borders[Map::COUNT];
  int32_t first[Map::CELLS + 2];
};

template <bool is_signed>
constexpr Lookup<is_signed> lookup() {
  constexpr codes::Map<is_signed> map = codes::make<is_signed>();
  static_assert(map.good, "two borders in one cell");
  Lookup<is_signed> found{};
  for (int code = 0; code < 256; ++code) {
    const int place = is_signed ? code - 127 : code;
    found.values[code] = place < 0 ? -map.values[-place] : map.values[place];
  }
  for (int i = 0; i < map.COUNT; ++i) found.borders[i] = map.borders[i];
  for (int i = 0; i < map.CELLS + 2; ++i) found.first[i] = map.first[i];
  return found;
}

template <bool is_signed>
inline constexpr Lookup<is_signed> LOOKUP = lookup<is_signed>();

template <bool is_signed>
[[gnu::always_inline]] inline void decode(const uint8_t* __restrict code, float scale, float* __restrict x,
                                          int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = LOOKUP<is_signed>.values[code[i]] * scale;
}

// New codes of up to 256 numbers; -> their scale, the largest absolute value.
template <bool is_signed>
[[gnu::always_inline]] inline float encode(const float* __restrict x, uint8_t* __restrict code, int64_t count) {
  using Map = codes::Map<is_signed>;
  const auto& table = LOOKUP<is_signed>;
  // As bits, numbers >= 0 are in the same order, any NaN above all.
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x[i]) & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  const float scale = __builtin_bit_cast(float, most);
  // x / scale by multiplications, which is the same but for the rounding. 1 / scale must not be infinite.
  const float up = scale < 1e-30f ? 0x1p64f : 1.0f;
  const float inverse = scale > 0.0f ? 1.0f / (scale * up) : 1.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float y = x[i] * up * inverse;
    const float size = __builtin_fabsf(y);
    int32_t cell = static_cast<int32_t>(__builtin_bit_cast(uint32_t, size) >> (23 - Map::BITS)) - Map::FIRST_CELL + 1;
    cell = cell < 0 ? 0 : cell;
    cell = cell > Map::CELLS + 1 ? Map::CELLS + 1 : cell;
    const int32_t first = table.first[cell];
    const float border = table.borders[first];
    if constexpr (is_signed) {
      const int32_t up = 127 + first + (size <= border ? 0 : 1);
      const int32_t down = 127 - first - (size >= border ? 1 : 0);
      const int32_t found = y < 0.0f ? (down < 0 ? 0 : down) : up;
      code[i] = static_cast<uint8_t>(found);
    } else {
      code[i] = static_cast<uint8_t>(first + (y <= border ? 0 : 1));
    }
  }
  return scale;
}

template <bool has_weight, class G, class W>
[[gnu::always_inline]] inline void adamw_8bit_range(const AdamW8bit<G, W>& args, int64_t begin, int64_t end) {
  alignas(64) float m[codes::BLOCK], v[codes::BLOCK];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t at = block * codes::BLOCK;
    const int64_t count = args.n - at < codes::BLOCK ? args.n - at : codes::BLOCK;
    decode<true>(args.exp_avg + at, args.exp_avg_scale[block], m, count);
    decode<false>(args.exp_avg_sq + at, args.exp_avg_sq_scale[block], v, count);
    adamw_loop<has_weight>(args.step, args.master + at, m, v, args.grad + at,
                           has_weight ? args.weight + at : nullptr, count);
    args.exp_avg_scale[block] = encode<true>(m, args.exp_avg + at, count);
    args.exp_avg_sq_scale[block] = encode<false>(v, args.exp_avg_sq + at, count);
  }
}

template <class G, class W>
void adamw_8bit(const AdamW8bit<G, W>& args, int64_t begin, int64_t end) {
  if (args.weight != nullptr) {
    adamw_8bit_range<true>(args, begin, end);
  } else {
    adamw_8bit_range<false>(args, begin, end);
  }
}
