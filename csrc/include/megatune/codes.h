// Codes of 8 bits for the moments of optimizers: the dynamic map of arXiv:2110.02861, made by the compiler, and how a
// number finds its code without searching.
//
// Values are 0, 1, and in each of seven decades below 1 twice as many as in the next lower one, the middles of equal
// parts of [0.1, 1]; half of them negative where signed (so 127 stands for 0, 127 + i and 127 - i for a number and its
// negative, and 255 for 1). A number takes the code between whose borders it lies, on a border the lower one.
#pragma once

#include <cstdint>

namespace megatune::codes {

constexpr int BLOCK = 256;  // elements that share one scale
constexpr int LOWEST = -23;  // 2^LOWEST is below every border

// Magnitudes in [2^LOWEST, 1) fall into cells: the power of two and the first BITS of the fraction. No cell has two
// borders in it, so a look at its first border gives the code.
template <bool is_signed>
struct Map {
  static constexpr int COUNT = is_signed ? 128 : 255;  // positive values
  static constexpr int BITS = is_signed ? 6 : 7;
  static constexpr int CELLS = -LOWEST * (1 << BITS);
  static constexpr int FIRST_CELL = (127 + LOWEST) * (1 << BITS);
  float values[COUNT + 1];     // rising, from 0 on
  float borders[COUNT];        // borders[i]: between values[i] and values[i + 1]
  uint8_t first[CELLS + 2];    // of each cell: how many borders are below it; before and behind: all smaller, larger
  bool good;
};

template <bool is_signed>
constexpr Map<is_signed> make() {
  using M = Map<is_signed>;
  M map{};
  constexpr double power[7] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
  int count = 1;
  for (int decade = 0; decade < 7; ++decade) {
    const int parts = 1 << (is_signed ? decade : decade + 1);
    for (int i = 0; i < parts; ++i)
      map.values[count++] = static_cast<float>((0.1 + 0.9 * (i + 0.5) / parts) * power[decade]);
  }
  map.values[count] = 1.0f;
  map.good = count == M::COUNT;
  for (int i = 0; i < M::COUNT; ++i)
    map.borders[i] = static_cast<float>((static_cast<double>(map.values[i + 1]) + map.values[i]) / 2);
  int below = 0;
  double unit = 1.0;
  for (int i = 0; i < -LOWEST; ++i) unit /= 2;
  map.good = map.good && map.borders[0] >= unit;
  for (int cell = 0; cell < M::CELLS; ++cell) {
    const int part = cell % (1 << M::BITS);
    if (cell > 0 && part == 0) unit *= 2;
    const double low = unit * (1.0 + static_cast<double>(part) / (1 << M::BITS));
    const double high = low + unit / (1 << M::BITS);
    while (below < M::COUNT && map.borders[below] < low) ++below;
    // Behind the last border the comparison with it says the same.
    map.first[cell + 1] = static_cast<uint8_t>(below < M::COUNT ? below : M::COUNT - 1);
    map.good = map.good && (below + 1 >= M::COUNT || map.borders[below + 1] >= high);
  }
  map.first[0] = 0;
  map.first[M::CELLS + 1] = static_cast<uint8_t>(M::COUNT - 1);
  return map;
}

// The same in one look. The bits of a number, shifted left by LEFT, less LOW are `at`, in [0, TOP]; its place is
// (cells[at >> 16] + at) >> 16, one byte, as the part of `at` within the cell carries behind the cell's border. Signed:
// the lowest bit says that the number is negative, which is then beyond a border that it is on.
template <bool is_signed>
struct Cells {
  static constexpr int LEFT = is_signed ? 1 : 0;
  static constexpr uint32_t LOW = static_cast<uint32_t>(127 + LOWEST) << (23 + LEFT);
  static constexpr uint32_t TOP = (127u << (23 + LEFT)) - LOW;
  uint32_t cells[(TOP >> 16) + 1];
  bool good;
};

template <bool is_signed>
constexpr Cells<is_signed> make_cells() {
  using C = Cells<is_signed>;
  constexpr uint32_t count = Map<is_signed>::COUNT;
  constexpr Map<is_signed> map = make<is_signed>();
  uint32_t borders[count + 1] = {};
  for (uint32_t i = 0; i < count; ++i) borders[i] = (__builtin_bit_cast(uint32_t, map.borders[i]) << C::LEFT) - C::LOW;
  borders[count] = ~0u;
  C found{};
  found.good = map.good;
  uint32_t below = 0;
  for (uint32_t cell = 0; cell <= C::TOP >> 16; ++cell) {
    const uint32_t low = cell << 16, high = low + 0x10000;
    while (borders[below] < low) ++below;
    found.cells[cell] = (below << 16) - low + (borders[below] < high ? high - 1 - borders[below] : 0);
    found.good = found.good && (borders[below] >= high || borders[below + 1] >= high);
  }
  return found;
}

}  // namespace megatune::codes
