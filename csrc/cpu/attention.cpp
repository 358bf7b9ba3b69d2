// Causal attention on packed documents with AMX tiles (bf16 products, fp32 sums), after FlashAttention 2
// (arXiv:2307.08691).
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

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "isa.h"

#if defined(MEGATUNE_X86)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__clang__)
_Pragma(
    "clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512dq,avx512vl,fma,amx-tile,amx-bf16\"))), "
    "apply_to=function)")
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,amx-tile,amx-bf16")
#pragma GCC target("prefer-vector-width=512")
#endif

namespace megatune::cpu::amx {
#include "simd.inl"

constexpr int64_t BLOCK = 32;  // queries and keys in one step: two tiles each way
constexpr float LOG2E = 1.44269504f;
constexpr float FAR = -1e30f;  // a maximum of nothing, finite so that no difference is NaN

INLINE u32x16 load_bits(const void* from) {
  u32x16 value;
  __builtin_memcpy(&value, from, 64);
  return value;
}

INLINE void store_bits(void* to, u32x16 value) { __builtin_memcpy(to, &value, 64); }

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

// Freed memory of this thread, for the next buffer: asking the system for fresh pages costs more than the kernels.
class Cache {
 public:
  ~Cache() {
    for (Block& block : blocks_) std::free(block.data);
  }
  void* take(int64_t bytes, int64_t& capacity) {
    for (Block& block : blocks_) {
      if (block.capacity < bytes || block.capacity > 4 * bytes) continue;
      capacity = std::exchange(block.capacity, 0);
      return std::exchange(block.data, nullptr);
    }
    capacity = bytes;
    void* data = std::aligned_alloc(64, bytes);
    if (data == nullptr) std::abort();  // out of memory on a worker thread: nothing could catch an exception
    return data;
  }
  void give(void* data, int64_t capacity) {
    Block* least = &blocks_[0];
    for (Block& block : blocks_)
      if (block.capacity < least->capacity) least = &block;
    if (least->capacity < capacity) {
      std::swap(least->data, data);
      least->capacity = capacity;
    }
    std::free(data);
  }

 private:
  struct Block {
    void* data = nullptr;
    int64_t capacity = 0;
  };
  Block blocks_[16];
};
thread_local Cache cache;

// `size` vectors on a 64-byte border (std::vector loses the alignment of a vector type), not initialised.
template <class Vector>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : size_(size), data_(static_cast<Vector*>(cache.take(64 * std::max<int64_t>(1, size), capacity_))) {}
  Buffer(Buffer&& other) noexcept
      : size_(other.size_), capacity_(other.capacity_), data_(std::exchange(other.data_, nullptr)) {}
  ~Buffer() {
    if (data_ != nullptr) cache.give(data_, capacity_);
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
Packed rows(const Plain& x) {
  Packed packed{Buffer<u32x16>(x.lines.size()), x.width / 32};
  u32x16* to = packed.lines.data();
  for (int64_t row = 0; row < x.rows; row += 16)
    for (int64_t column = 0; column < x.width; column += 32, to += 16) {
      for (int i = 0; i < 16; ++i) to[i] = x.lines[(row + i) * x.width / 32 + column / 32];
    }
  return packed;
}

// Tile (row block of 16, width block of 32), the rows of X as columns.
Packed turned(const Plain& x) {
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
Packed paired(const Plain& x) {
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
Packed transposed(const Plain& x) {
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

// sum [32, width] (row stride `width` floats, 32 rows) += left [32 x 32] (two A tiles) times b's row block of 32.
INLINE void add_product(float* sum, const void* top, const void* bottom, int64_t stride, const Packed& b, int64_t row) {
  const int64_t width = b.columns * 16;
  settle();
  _tile_loadd(4, top, stride);
  _tile_loadd(5, bottom, stride);
  for (int64_t c = 0; c < b.columns; c += 2) {
    float* upper = sum + c * 16;
    float* lower = upper + 16 * width;
    _tile_loadd(6, b.tile(row / 32, c), 64);
    _tile_loadd(7, b.tile(row / 32, c + 1), 64);
    _tile_loadd(0, upper, width * sizeof(float));
    _tile_loadd(1, upper + 16, width * sizeof(float));
    _tile_loadd(2, lower, width * sizeof(float));
    _tile_loadd(3, lower + 16, width * sizeof(float));
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_stored(0, upper, width * sizeof(float));
    _tile_stored(1, upper + 16, width * sizeof(float));
    _tile_stored(2, lower, width * sizeof(float));
    _tile_stored(3, lower + 16, width * sizeof(float));
  }
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

// Online softmax of one block for 16 queries: updates maximum and sum, leaves probabilities as pairs of keys.
INLINE f32x16 softmax_step(const Scores& scores, int half, const Scaling& scaling, const View& view, int64_t query,
                           int64_t key, bool whole, f32x16& maximum, f32x16& total, u32x16 (&pairs)[16]) {
  f32x16 s[BLOCK];
  f32x16 most = maximum;
  for (int r = 0; r < BLOCK; ++r) {
    s[r] = scaling.apply(load(&scores.at[r][16 * half], Full{}));
    if (!whole) s[r] = view.sees(query + 16 * half, key + r) ? s[r] : splat(-std::numeric_limits<float>::infinity());
    most = max(most, s[r]);
  }
  const f32x16 shrink = exp2(maximum - most);
  f32x16 sum{};
  for (int r = 0; r < BLOCK; r += 2) {
    const f32x16 even = exp2(s[r] - most), odd = exp2(s[r + 1] - most);
    sum += even + odd;
    pairs[r / 2] = pair(even, odd);
  }
  total = total * shrink + sum;
  maximum = most;
  return shrink;
}

void forward_head(const Attention& args, const Document& document, const Packed& k, const Packed& v, int64_t head) {
  const int64_t length = document.length, width = k.columns * 32;
  const View view{args.window};
  const Scaling scaling(args);
  const Packed q = turned(
      Plain(args.q + document.start * args.q_token + head * args.q_head, args.q_token, length, args.width));
  Buffer<f32x16> sum(width * 2);  // [width, 32 queries]
  for (int64_t query = 0; query < length; query += BLOCK) {
    f32x16 maximum[2] = {splat(FAR), splat(FAR)}, total[2] = {};
    sum.clear();
    for (int64_t key = view.first(query); key <= query; key += BLOCK) {
      Scores scores;
      u32x16 pairs[2][16];
      f32x16 shrink[2];
      product(k, key, q, query, scores);
      const bool whole = view.whole(query, key);
      for (int half = 0; half < 2; ++half)
        shrink[half] = softmax_step(scores, half, scaling, view, query, key, whole, maximum[half], total[half],
                                    pairs[half]);
      for (int64_t i = 0; i < width; ++i) sum[2 * i] *= shrink[0], sum[2 * i + 1] *= shrink[1];
      add_transposed_product(sum.floats(), v, key, pairs);
    }
    for (int half = 0; half < 2; ++half) {
      const f32x16 inverse = 1.0f / total[half];
      for (int64_t i = 0; i < width; ++i) sum[2 * i + half] *= inverse;
    }
    const int64_t token = document.start + query, count = std::min(BLOCK, length - query);
    const int64_t stride = args.heads * args.width;
    store_turned(sum, args.width, count, 1.0f, args.out + token * stride + head * args.width, stride);
    for (int64_t i = 0; i < count; ++i)
      args.lse[head * args.tokens + token + i] =
          (maximum[i / 16][i % 16] + std::log2(total[i / 16][i % 16])) / LOG2E;
  }
}

void attention(const Attention& args, int64_t begin, int64_t end) {
  _tile_loadconfig(&TILES);
  const int64_t group = args.heads / args.kv_heads;
  for (int64_t task = begin; task < end; ++task) {
    const Document document(args, task);
    const Packed k = rows(Plain(args.k + document.start * args.k_token + document.kv_head * args.k_head, args.k_token,
                                document.length, args.width));
    const Packed v = transposed(Plain(args.v + document.start * args.v_token + document.kv_head * args.v_head,
                                      args.v_token, document.length, args.width));
    for (int64_t i = 0; i < group; ++i) forward_head(args, document, k, v, document.kv_head * group + i);
  }
  _tile_release();
}

// The keys and values of one KV head of a document, and the sums of their gradients [padded length, padded width].
struct KeyValues {
  Packed k_rows, v_rows, k_transposed;
  Buffer<f32x16> grad_k, grad_v;
  KeyValues(const Plain& k, const Plain& v)
      : k_rows(rows(k)), v_rows(rows(v)), k_transposed(transposed(k)), grad_k(k.rows * k.width / 16),
        grad_v(k.rows * k.width / 16) {
    grad_k.clear();
    grad_v.clear();
  }
};

// Probabilities and score gradients of one block for 16 queries, as A tiles (keys x queries) and as pairs of keys.
struct alignas(64) Gradients {
  bf16 p[BLOCK][BLOCK], ds[BLOCK][BLOCK];
  u32x16 pairs[2][16];
};

INLINE void gradient_step(const Scores& scores, const Scores& grad_p, int half, const Scaling& scaling,
                          const View& view, int64_t query, int64_t key, bool whole, f32x16 lse, f32x16 delta,
                          Gradients& out) {
  for (int r = 0; r < BLOCK; r += 2) {
    f32x16 ds[2];
    for (int odd = 0; odd < 2; ++odd) {
      const f32x16 s = scaling.apply(load(&scores.at[r + odd][16 * half], Full{}));
      f32x16 p = exp2(s - lse);
      if (!whole) p = view.sees(query + 16 * half, key + r + odd) ? p : f32x16{};
      ds[odd] = p * (load(&grad_p.at[r + odd][16 * half], Full{}) - delta);
      if (scaling.cap != 0.0f) ds[odd] *= scaling.slope(s);
      store(&out.p[r + odd][16 * half], p, Full{});
      store(&out.ds[r + odd][16 * half], ds[odd], Full{});
    }
    out.pairs[half][r / 2] = pair(ds[0], ds[1]);
  }
}

void backward_head(const AttentionBackward& args, const Document& document, KeyValues& kv, int64_t head) {
  const Attention& fwd = args.forward;
  const int64_t length = document.length, width = kv.k_rows.columns * 32;
  const int64_t row = fwd.heads * fwd.width, offset = document.start * row + head * fwd.width;
  const View view{fwd.window};
  const Scaling scaling(fwd);
  const Plain q_plain(fwd.q + document.start * fwd.q_token + head * fwd.q_head, fwd.q_token, length, fwd.width);
  const Plain grad_plain(args.grad + offset, row, length, fwd.width);
  const Packed q_turned = turned(q_plain), q_paired = paired(q_plain);
  const Packed grad_turned = turned(grad_plain), grad_paired = paired(grad_plain);
  Buffer<f32x16> sum(width * 2);  // gradient of q^T [width, 32 queries]
  for (int64_t query = 0; query < length; query += BLOCK) {
    float lse[BLOCK] = {}, delta[BLOCK] = {};
    for (int64_t i = 0; i < BLOCK && query + i < length; ++i) {
      const bf16* grad = args.grad + offset + (query + i) * row;
      const bf16* out = fwd.out + offset + (query + i) * row;
      f32x16 products{};
      each_vector(fwd.width, [&](int64_t d, auto n) { products += load(grad + d, n) * load(out + d, n); });
      delta[i] = amx::sum(products);
      lse[i] = fwd.lse[head * fwd.tokens + document.start + query + i] * LOG2E;
    }
    sum.clear();
    for (int64_t key = view.first(query); key <= query; key += BLOCK) {
      Scores scores, grad_p;
      Gradients block;
      product(kv.k_rows, key, q_turned, query, scores);
      product(kv.v_rows, key, grad_turned, query, grad_p);
      const bool whole = view.whole(query, key);
      for (int half = 0; half < 2; ++half)
        gradient_step(scores, grad_p, half, scaling, view, query, key, whole, load(lse + 16 * half, Full{}),
                      load(delta + 16 * half, Full{}), block);
      const int64_t stride = sizeof(bf16) * BLOCK;
      add_product(kv.grad_v.floats() + key * width, block.p[0], block.p[16], stride,
                  grad_paired, query);
      add_product(kv.grad_k.floats() + key * width, block.ds[0], block.ds[16], stride,
                  q_paired, query);
      add_transposed_product(sum.floats(), kv.k_transposed, key, block.pairs);
    }
    store_turned(sum, fwd.width, std::min(BLOCK, length - query), fwd.scale, args.grad_q + offset + query * row, row);
  }
}

void attention_backward(const AttentionBackward& args, int64_t begin, int64_t end) {
  const Attention& fwd = args.forward;
  _tile_loadconfig(&TILES);
  const int64_t group = fwd.heads / fwd.kv_heads;
  for (int64_t task = begin; task < end; ++task) {
    const Document document(fwd, task);
    KeyValues kv(Plain(fwd.k + document.start * fwd.k_token + document.kv_head * fwd.k_head, fwd.k_token,
                       document.length, fwd.width),
                 Plain(fwd.v + document.start * fwd.v_token + document.kv_head * fwd.v_head, fwd.v_token,
                       document.length, fwd.width));
    for (int64_t i = 0; i < group; ++i) backward_head(args, document, kv, document.kv_head * group + i);
    const int64_t width = kv.k_rows.columns * 32;
    for (int64_t i = 0; i < document.length; ++i) {
      const int64_t at = ((document.start + i) * fwd.kv_heads + document.kv_head) * fwd.width;
      const float* grad_k = kv.grad_k.floats() + i * width;
      const float* grad_v = kv.grad_v.floats() + i * width;
      each_vector(fwd.width, [&](int64_t d, auto n) {
        store(args.grad_k + at + d, load(grad_k + d, n) * fwd.scale, n);
        store(args.grad_v + at + d, load(grad_v + d, n), n);
      });
    }
  }
  _tile_release();
}

}  // namespace megatune::cpu::amx
MEGATUNE_TARGET_END

namespace megatune::cpu {

static bool detect_amx() {
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return isa() == Isa::avx512 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

bool has_amx() {
  static const bool found = detect_amx();
  return found;
}

void attention(const Attention& args, int64_t begin, int64_t end) { amx::attention(args, begin, end); }

void attention_backward(const AttentionBackward& args, int64_t begin, int64_t end) {
  amx::attention_backward(args, begin, end);
}

}  // namespace megatune::cpu

#else

namespace megatune::cpu {

bool has_amx() { return false; }
void attention(const Attention&, int64_t, int64_t) {}
void attention_backward(const AttentionBackward&, int64_t, int64_t) {}

}  // namespace megatune::cpu

#endif
