// What the two passes of attention (attention_forward.cpp, attention_backward.cpp) share. Included inside
// namespace megatune::cpu::amx with MEGATUNE_TARGET_AMX on; unnamed inside, for each file has its own copy.
//
//
// Everything is computed transposed: score tiles have keys as rows and queries as columns. So the softmax of 16
// queries is one vector, maxima and sums over keys are vertical, and the probabilities leave the vector unit in the
// form in which the tiles take them: no transposition in the inner loops.
//
// A tile is 16 rows of 64 bytes. C [16 x 16 fp32] += A [16 x 32 bf16] B, where B holds a [32 x 16] matrix with rows
// 2r and 2r+1 interleaved as 16 pairs. From a row-major X [rows, width], both padded with zeros to multiples of 32:
//   rows(X)        A of X itself
//   turned(X)      B of X^T: each 16 x 16 block of pairs along the width, transposed
//   paired(X)      B of X: rows 2r and 2r+1 interleaved
//   transposed(X)  A of X^T

namespace {
#include "simd.inl"

constexpr int64_t BLOCK = 32;  // queries and keys in one step: two tiles each way
constexpr float LOG2E = 1.44269504f;

// Swaps the upper half of each group of 2 * STEP lanes of a with the lower half of b's.
#define MEGATUNE_SWAP(a, b, LOW, HIGH)                       \
  {                                                          \
    const u32x16 low = __builtin_shufflevector(a, b, LOW);   \
    const u32x16 high = __builtin_shufflevector(a, b, HIGH); \
    a = low;                                                 \
    b = high;                                                \
  }
#define MEGATUNE_8_LOW 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define MEGATUNE_8_HIGH 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define MEGATUNE_4_LOW 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define MEGATUNE_4_HIGH 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define MEGATUNE_2_LOW 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define MEGATUNE_2_HIGH 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define MEGATUNE_1_LOW 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define MEGATUNE_1_HIGH 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31

INLINE void transpose(u32x16 (&r)[16]) {
  for (int i = 0; i < 8; ++i) MEGATUNE_SWAP(r[i], r[i + 8], MEGATUNE_8_LOW, MEGATUNE_8_HIGH)
  for (int i = 0; i < 16; ++i)
    if ((i & 4) == 0) MEGATUNE_SWAP(r[i], r[i + 4], MEGATUNE_4_LOW, MEGATUNE_4_HIGH)
  for (int i = 0; i < 16; ++i)
    if ((i & 2) == 0) MEGATUNE_SWAP(r[i], r[i + 2], MEGATUNE_2_LOW, MEGATUNE_2_HIGH)
  for (int i = 0; i < 16; ++i)
    if ((i & 1) == 0) MEGATUNE_SWAP(r[i], r[i + 1], MEGATUNE_1_LOW, MEGATUNE_1_HIGH)
}

// 2^x with a relative error of about 2e-7 (Taylor series on [-1/2, 1/2]); 0 below -126. For x <= 0 or a little above.
INLINE f32x16 exp2(f32x16 x) {
  const f32x16 magic = splat(12582912.0f);
  const f32x16 clamped = x < -126.0f ? splat(-126.0f) : x;
  const f32x16 n = (clamped + magic) - magic;
  const f32x16 r = clamped - n;
  f32x16 p = splat(1.5403530e-4f);
  p = p * r + 1.3333558e-3f;
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  const f32x16 power = std::bit_cast<f32x16>((__builtin_convertvector(n, i32x16) + 127) << 23);
  return x < -126.0f ? f32x16{} : p * power;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig TILES;  // eight tiles, all of them whole

// `size` vectors on a 64-byte border (std::vector loses the alignment of a vector type), not initialised.
template <class Vector>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : size_(size), data_(static_cast<Vector*>(take_scratch(64 * std::max<int64_t>(1, size), capacity_))) {}
  Buffer(Buffer&& other) noexcept
      : size_(other.size_), capacity_(other.capacity_), data_(std::exchange(other.data_, nullptr)) {}
  ~Buffer() {
    if (data_ != nullptr) give_scratch(data_, capacity_);
  }
  void clear() { std::memset(static_cast<void*>(data_), 0, 64 * size_); }
  int64_t size() const { return size_; }
  Vector* data() { return data_; }
  Vector& operator[](int64_t i) { return data_[i]; }
  const Vector& operator[](int64_t i) const { return data_[i]; }
  float* floats() { return reinterpret_cast<float*>(data_); }

 private:
  int64_t size_, capacity_ = 0;
  Vector* data_;
};

// A matrix of one head of one document in tile order: `tiles` of 1 KiB, tile (r, c) at index r * columns + c.
struct Packed {
  Buffer<u32x16> lines;
  int64_t columns;
  const void* tile(int64_t row, int64_t column) const { return &lines[16 * (row * columns + column)]; }
};

// A head's rows, padded to multiples of 32 both ways, in plain order.
struct Plain {
  int64_t rows, width;  // padded
  Buffer<u32x16> lines;
  Plain(const bf16* from, int64_t token_stride, int64_t length, int64_t true_width)
      : rows((length + 31) / 32 * 32), width((true_width + 31) / 32 * 32), lines(rows * width / 32) {
    if (rows > length || width > true_width) lines.clear();
    for (int64_t i = 0; i < length; ++i)
      std::memcpy(static_cast<void*>(&lines[i * width / 32]), from + i * token_stride, true_width * sizeof(bf16));
  }
  // 16 rows from `row` on, 32 columns from `column` on, as pairs along the width.
  void load(int64_t row, int64_t column, u32x16 (&into)[16]) const {
    for (int i = 0; i < 16; ++i) into[i] = lines[(row + i) * width / 32 + column / 32];
  }
};

// Tile (row block of 16, width block of 32).
inline Packed rows(const Plain& x) {
  Packed packed{Buffer<u32x16>(x.lines.size()), x.width / 32};
  u32x16* to = packed.lines.data();
  for (int64_t row = 0; row < x.rows; row += 16)
    for (int64_t column = 0; column < x.width; column += 32, to += 16) {
      for (int i = 0; i < 16; ++i) to[i] = x.lines[(row + i) * x.width / 32 + column / 32];
    }
  return packed;
}

// Tile (row block of 16, width block of 32), the rows of X as columns.
inline Packed turned(const Plain& x) {
  Packed packed{Buffer<u32x16>(x.lines.size()), x.width / 32};
  u32x16* to = packed.lines.data();
  for (int64_t row = 0; row < x.rows; row += 16)
    for (int64_t column = 0; column < x.width; column += 32, to += 16) {
      u32x16 block[16];
      x.load(row, column, block);
      transpose(block);
      for (int i = 0; i < 16; ++i) to[i] = block[i];
    }
  return packed;
}

// Two tiles' worth of rows 2r and 2r+1 interleaved: 32 rows from `row` on, 32 columns from `column` on.
INLINE void interleave(const Plain& x, int64_t row, int64_t column, u32x16 (&left)[16], u32x16 (&right)[16]) {
  const int64_t stride = x.width / 32;
  const u32x16* from = &x.lines[row * stride + column / 32];
  for (int i = 0; i < 16; ++i) {
    u16x16 even[2], odd[2];
    __builtin_memcpy(even, from + 2 * i * stride, 64);
    __builtin_memcpy(odd, from + (2 * i + 1) * stride, 64);
    left[i] = __builtin_convertvector(even[0], u32x16) | (__builtin_convertvector(odd[0], u32x16) << 16);
    right[i] = __builtin_convertvector(even[1], u32x16) | (__builtin_convertvector(odd[1], u32x16) << 16);
  }
}

// Tile (row block of 32, width block of 16).
inline Packed paired(const Plain& x) {
  Packed packed{Buffer<u32x16>(x.lines.size()), x.width / 16};
  u32x16* to = packed.lines.data();
  for (int64_t row = 0; row < x.rows; row += 32)
    for (int64_t column = 0; column < x.width; column += 32, to += 32) {
      u32x16 left[16], right[16];
      interleave(x, row, column, left, right);
      for (int i = 0; i < 16; ++i) to[i] = left[i], to[16 + i] = right[i];
    }
  return packed;
}

// Tile (row block of 32, width block of 16) of X^T: 16 of X's columns as rows, 32 of X's rows as columns.
inline Packed transposed(const Plain& x) {
  Packed packed{Buffer<u32x16>(x.lines.size()), x.width / 16};
  u32x16* to = packed.lines.data();
  for (int64_t row = 0; row < x.rows; row += 32)
    for (int64_t column = 0; column < x.width; column += 32, to += 32) {
      u32x16 left[16], right[16];
      interleave(x, row, column, left, right);
      transpose(left);
      transpose(right);
      for (int i = 0; i < 16; ++i) to[i] = left[i], to[16 + i] = right[i];
    }
  return packed;
}

// Tile instructions read memory behind the compiler's back: everything must have been written before them.
INLINE void settle() { asm volatile("" ::: "memory"); }

struct alignas(64) Scores {  // [32 keys][32 queries]
  float at[BLOCK][BLOCK];
};

// scores = rows (32 keys from `keys` on) times turned (32 queries from `queries` on).
INLINE void product(const Packed& a, int64_t keys, const Packed& b, int64_t queries, Scores& scores) {
  settle();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t c = 0; c < a.columns; ++c) {
    _tile_loadd(4, a.tile(keys / 16, c), 64);
    _tile_loadd(5, a.tile(keys / 16 + 1, c), 64);
    _tile_loadd(6, b.tile(queries / 16, c), 64);
    _tile_loadd(7, b.tile(queries / 16 + 1, c), 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, &scores.at[0][0], sizeof(float) * BLOCK);
  _tile_stored(1, &scores.at[0][16], sizeof(float) * BLOCK);
  _tile_stored(2, &scores.at[16][0], sizeof(float) * BLOCK);
  _tile_stored(3, &scores.at[16][16], sizeof(float) * BLOCK);
}

// sum [width, 32 queries] += transposed's row block (32 keys) times right [32 keys x 32 queries] (two B tiles).
INLINE void add_transposed_product(float* sum, const Packed& a, int64_t keys, const u32x16 (&right)[2][16]) {
  settle();
  _tile_loadd(6, &right[0], 64);
  _tile_loadd(7, &right[1], 64);
  for (int64_t c = 0; c < a.columns; c += 2) {
    float* upper = sum + c * 16 * BLOCK;
    float* lower = upper + 16 * BLOCK;
    _tile_loadd(4, a.tile(keys / 32, c), 64);
    _tile_loadd(5, a.tile(keys / 32, c + 1), 64);
    _tile_loadd(0, upper, BLOCK * sizeof(float));
    _tile_loadd(1, upper + 16, BLOCK * sizeof(float));
    _tile_loadd(2, lower, BLOCK * sizeof(float));
    _tile_loadd(3, lower + 16, BLOCK * sizeof(float));
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_stored(0, upper, BLOCK * sizeof(float));
    _tile_stored(1, upper + 16, BLOCK * sizeof(float));
    _tile_stored(2, lower, BLOCK * sizeof(float));
    _tile_stored(3, lower + 16, BLOCK * sizeof(float));
  }
}

// Writes sum [width, 32 queries] as rows of queries, the first `count` of them, times factor.
INLINE void store_turned(const Buffer<f32x16>& sum, int64_t true_width, int64_t count, float factor, bf16* to,
                         int64_t stride) {
  for (int64_t half = 0; 16 * half < count; ++half)
    for (int64_t column = 0; column < true_width; column += 16) {
      u32x16 block[16];
      for (int i = 0; i < 16; ++i) block[i] = std::bit_cast<u32x16>(sum[2 * (column + i) + half]);
      transpose(block);
      for (int64_t i = 0; i < 16 && 16 * half + i < count; ++i) {
        const f32x16 value = std::bit_cast<f32x16>(block[i]) * factor;
        bf16* at = to + (16 * half + i) * stride + column;
        if (column + 16 <= true_width) {
          store(at, value, Full{});
        } else {
          store(at, value, static_cast<int>(true_width - column));
        }
      }
    }
}

// Which keys the queries from `query` on see, in blocks of 32.
struct View {
  int64_t window;
  int64_t first(int64_t query) const {
    return window == 0 || query < window ? 0 : (query - window + 1) / BLOCK * BLOCK;
  }
  // Whether each of 32 queries sees each of 32 keys.
  bool whole(int64_t query, int64_t key) const {
    return key + BLOCK - 1 <= query && (window == 0 || query + BLOCK - 1 - key < window);
  }
  // -1 in the lanes (queries from `query` on) that see `key`.
  INLINE i32x16 sees(int64_t query, int64_t key) const {
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const i32x16 distance = lane + static_cast<int32_t>(query - key);
    const i32x16 causal = distance >= 0;
    return window == 0 ? causal : causal & (distance < static_cast<int32_t>(window));
  }
};

// Scores as the softmax takes them, in units of log 2: scaled, capped; `slope` is the cap's derivative.
struct Scaling {
  float scale, cap;
  explicit Scaling(const Attention& args) : scale(args.scale), cap(args.softcap) {}
  INLINE f32x16 apply(f32x16 score) const {
    return cap == 0.0f ? score * (scale * LOG2E) : tanh(score * (scale / cap)) * (cap * LOG2E);
  }
  INLINE f32x16 slope(f32x16 applied) const {
    const f32x16 t = applied * (1.0f / (cap * LOG2E));
    return 1.0f - t * t;
  }
};

INLINE u32x16 pair(f32x16 even, f32x16 odd) { return round_to_bf16(even) | (round_to_bf16(odd) << 16); }

struct Document {
  int64_t start, length, kv_head;
  Document(const Attention& args, int64_t task)
      : start(args.borders[task / args.kv_heads]),
        length(args.borders[task / args.kv_heads + 1] - start),
        kv_head(task % args.kv_heads) {}
};

}  // namespace
