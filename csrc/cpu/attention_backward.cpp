// The gradients of attention_forward.cpp, with AMX tiles as there (attention.inl).

#include <algorithm>
#include <utility>

#include "isa.h"
#include "scratch.h"

#if defined(MEGATUNE_X86)

#include <immintrin.h>

MEGATUNE_TARGET_AMX
namespace megatune::cpu::amx {
#include "attention.inl"

namespace {

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

}  // namespace

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

void attention_backward(const AttentionBackward& args, int64_t begin, int64_t end) {
  amx::attention_backward(args, begin, end);
}

}  // namespace megatune::cpu

#else

namespace megatune::cpu {

void attention_backward(const AttentionBackward&, int64_t, int64_t) {}

}  // namespace megatune::cpu

#endif
