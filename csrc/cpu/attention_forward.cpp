// Causal attention on packed documents with AMX tiles (bf16 products, fp32 sums), after FlashAttention 2
// (arXiv:2307.08691): the forward pass. attention.inl says how the tiles lie.

#include <algorithm>
#include <utility>

#include "isa.h"
#include "scratch.h"

#if defined(MEGATUNE_X86)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

MEGATUNE_TARGET_AMX
namespace megatune::cpu::amx {
#include "attention.inl"

namespace {

constexpr float FAR = -1e30f;  // a maximum of nothing, finite so that no difference is NaN

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

}  // namespace

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

}  // namespace megatune::cpu

#else

namespace megatune::cpu {

bool has_amx() { return false; }
void attention(const Attention&, int64_t, int64_t) {}

}  // namespace megatune::cpu

#endif
