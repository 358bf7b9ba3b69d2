// The router of a mixture of experts: each token's scores, its best experts, their weights; and the way back.
//
// LANES neighbours of a warp have a token, PER experts each, four in a row. No atomics: every sum is made in one fixed
// order.

#include <type_traits>

#include "../common/dependent.cuh"
#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "megatune/cuda_tokens.h"

namespace megatune::cuda {

namespace {

constexpr int THREADS = 32;  // small blocks end one by one
constexpr int WARPS = THREADS / 32;
constexpr int BEST = 8;  // choices that sorting finds
constexpr float INF = __builtin_huge_valf();

// Over the lanes of a token, given to all of them.
template <int LANES>
__device__ inline float sum_of(float value) {
#pragma unroll
  for (int lane = LANES / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
  return value;
}

template <int LANES>
__device__ inline float max_of(float value) {
#pragma unroll
  for (int lane = LANES / 2; lane > 0; lane /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, lane));
  return value;
}

// What a thread has of rows of `experts` floats.
template <int LANES, int PER>
struct Part {
  int lane;  // of the token's
  int experts;
  bool whole;  // rows can be read and written 16 bytes at a time

  // The number of the thread's i-th expert.
  __device__ int at(int i) const { return (i / 4 * LANES + lane) * 4 + i % 4; }

  __device__ void load(const float* from, float other, float (&values)[PER]) const {
#pragma unroll
    for (int i = 0; i < PER; i += 4) {
      float4 four{other, other, other, other};
      if (whole) {
        if (at(i) < experts) four = *reinterpret_cast<const float4*>(from + at(i));
      } else {
        if (at(i) < experts) four.x = from[at(i)];
        if (at(i + 1) < experts) four.y = from[at(i + 1)];
        if (at(i + 2) < experts) four.z = from[at(i + 2)];
        if (at(i + 3) < experts) four.w = from[at(i + 3)];
      }
      values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    }
  }

  __device__ void store(float* to, const float (&values)[PER]) const {
#pragma unroll
    for (int i = 0; i < PER; i += 4) {
      if (whole) {
        if (at(i) < experts)
          *reinterpret_cast<float4*>(to + at(i)) = float4{values[i], values[i + 1], values[i + 2], values[i + 3]};
      } else {
#pragma unroll
        for (int j = i; j < i + 4; ++j)
          if (at(j) < experts) to[at(j)] = values[j];
      }
    }
  }

  // To and from shared memory, which has room for all.
  __device__ void keep(float* to, const float (&values)[PER]) const {
#pragma unroll
    for (int i = 0; i < PER; i += 4)
      *reinterpret_cast<float4*>(to + at(i)) = float4{values[i], values[i + 1], values[i + 2], values[i + 3]};
  }

  __device__ void recall(const float* from, float (&values)[PER]) const {
#pragma unroll
    for (int i = 0; i < PER; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + at(i));
      values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    }
  }
};

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

struct Total {
  float greatest, sum;
};

// Logits -> exp(logit - greatest) or sigmoids, and their sum over the experts. -inf stands where there is no expert.
template <int LANES, int PER, Score SCORE>
__device__ inline Total activate(const float (&logits)[PER], float (&values)[PER]) {
  float greatest = 0.0f, parts[PER];
  if constexpr (SCORE != Score::sigmoid) {
#pragma unroll
    for (int i = 0; i < PER; ++i) parts[i] = logits[i];
#pragma unroll
    for (int half = PER / 2; half > 0; half /= 2)
#pragma unroll
      for (int i = 0; i < PER / 2; ++i)
        if (i < half) parts[i] = fmaxf(parts[i], parts[i + half]);
    greatest = max_of<LANES>(parts[0]);
  }
#pragma unroll
  for (int i = 0; i < PER; ++i)
    parts[i] = values[i] = SCORE == Score::sigmoid ? sigmoid(logits[i]) : expf(logits[i] - greatest);
#pragma unroll
  for (int half = PER / 2; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < PER / 2; ++i)
      if (i < half) parts[i] += parts[i + half];
  return {greatest, sum_of<LANES>(parts[0])};
}

// Division by a sum that is 1 at least: rounded as a division is.
struct Divisor {
  float sum, inverse;
  __device__ explicit Divisor(float by) : sum(by), inverse(1.0f / by) {}
  __device__ float operator()(float value) const {
    const float quotient = value * inverse;
    return fmaf(fmaf(-quotient, sum, value), inverse, quotient);
  }
};

// ---- choice

// Numbers in the order of the floats, all above 0: which is for those that cannot be chosen any more. NaN comes first:
// it shall be seen in the weights.
__device__ inline uint32_t rank_of(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);  // -0 is equal to 0
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

__device__ inline float corrected(const Router& args, float value, int expert) {
  return args.correction != nullptr && expert < args.experts ? value + args.correction[expert] : value;
}

__device__ inline void order(uint32_t& first, uint32_t& second) {
  const uint32_t least = min(first, second);
  first = max(first, second), second = least;
}

// Descending, both. The second: of a sequence that falls and rises, or rises and falls.
template <int FROM, int PER>
__device__ inline void sort_eight(uint32_t (&keys)[PER]) {
  constexpr int pairs[19][2] = {{0, 1}, {2, 3}, {4, 5}, {6, 7}, {0, 2}, {1, 3}, {4, 6}, {5, 7}, {1, 2}, {5, 6},
                                {0, 4}, {1, 5}, {2, 6}, {3, 7}, {2, 4}, {3, 5}, {1, 2}, {3, 4}, {5, 6}};
#pragma unroll
  for (int i = 0; i < 19; ++i) order(keys[FROM + pairs[i][0]], keys[FROM + pairs[i][1]]);
}

__device__ inline void merge(uint32_t (&keys)[BEST]) {
#pragma unroll
  for (int step = BEST / 2; step > 0; step /= 2)
#pragma unroll
    for (int i = 0; i < BEST; ++i)
      if ((i & step) == 0) order(keys[i], keys[i + step]);
}

// The best eight of all lanes' keys, of which `less` of each lane are taken off first; given to all of them.
template <int LANES, int PER>
__device__ inline void best_of(uint32_t (&keys)[PER], uint32_t (&best)[BEST], uint32_t less) {
  sort_eight<0>(keys);
  if constexpr (PER == 2 * BEST) {
    sort_eight<BEST>(keys);
#pragma unroll
    for (int i = 0; i < BEST; ++i) best[i] = max(keys[i], keys[PER - 1 - i]);
    merge(best);
  } else {
    static_assert(PER == BEST);
#pragma unroll
    for (int i = 0; i < BEST; ++i) best[i] = keys[i];
  }
#pragma unroll
  for (int i = 0; i < BEST; ++i) best[i] -= less;
#pragma unroll
  for (int step = 1; step < LANES; step *= 2) {
    uint32_t other[BEST];
#pragma unroll
    for (int i = 0; i < BEST; ++i) other[i] = __shfl_xor_sync(0xffffffffu, best[BEST - 1 - i], step);
#pragma unroll
    for (int i = 0; i < BEST; ++i) best[i] = max(best[i], other[i]);
    merge(best);
  }
}

// The lowest number with the greatest rank among the lanes' candidates, given to all of them.
__device__ inline int warp_best(uint32_t rank, int at) {
  const uint32_t greatest = __reduce_max_sync(0xffffffffu, rank);
  return static_cast<int>(__reduce_min_sync(0xffffffffu, rank == greatest ? static_cast<uint32_t>(at) : UINT32_MAX));
}

// Bits of the best groups; a group's score is the sum of its best two. values: of one token, in shared memory.
__device__ inline uint32_t best_groups(const Router& args, const float* values) {
  const int lane = threadIdx.x % 32, size = static_cast<int>(args.experts / args.groups);
  float first = -INF, second = -INF;
  if (lane < args.groups) {
    for (int i = lane * size; i < (lane + 1) * size; ++i) {
      const float score = corrected(args, values[i], i);
      if (score > first || isnan(score)) {
        second = first, first = isnan(score) ? INF : score;
      } else if (score > second) {
        second = score;
      }
    }
  }
  const float mine = size == 1 ? first : first + second;
  bool free = lane < args.groups;
  uint32_t allowed = 0;
  for (int64_t pick = 0; pick < args.groups_per_token; ++pick) {
    const int best = warp_best(free ? rank_of(mine) : 0, lane);
    if (best == lane) free = false;
    allowed |= 1u << best;
  }
  return allowed;
}

// The expert of choice `lane` of one token, by the whole warp, one choice after the other.
template <int ALL>
__device__ inline int choose(const Router& args, const float* values) {
  constexpr int EACH = ALL / 32;
  const int lane = threadIdx.x % 32, size = static_cast<int>(args.experts / args.groups);
  const uint32_t allowed = args.groups_per_token < args.groups ? best_groups(args, values) : UINT32_MAX;
  uint32_t ranks[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int expert = i * 32 + lane;
    const bool here = expert < args.experts;
    float score = here ? corrected(args, values[expert], expert) : 0.0f;
    if (args.groups_per_token < args.groups && here && !(allowed >> (expert / size) & 1u)) score = -INF;
    ranks[i] = here ? rank_of(score) : 0;
  }
  int chosen = 0;
  for (int choice = 0; choice < args.choices; ++choice) {
    uint32_t rank = ranks[0];
    int at = lane;
#pragma unroll
    for (int i = 1; i < EACH; ++i)
      if (ranks[i] > rank) rank = ranks[i], at = i * 32 + lane;
    const int best = warp_best(rank, at);
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      if (best == i * 32 + lane) ranks[i] = 0;
    if (lane == choice) chosen = best;
  }
  return chosen;
}

// SIMPLE: known are `whole`, `sorting` and that there is no correction.
template <int LANES, int PER, Score SCORE, bool SIMPLE>
__global__ void __launch_bounds__(THREADS) router_kernel(const Router args, bool whole, bool sorting) {
  constexpr int TOKENS = 32 / LANES, ALL = LANES * PER;
  // A key is what of the rank is above these bits, and below it the expert's number from behind: of equal ranks the
  // lower number is the greater key.
  constexpr uint32_t NUMBER = ALL - 1;
  __shared__ __align__(16) float shared[WARPS][TOKENS][ALL];
  const int lane = threadIdx.x % LANES, in_warp = threadIdx.x % 32 / LANES, warp = threadIdx.x / 32;
  const int64_t token = (static_cast<int64_t>(blockIdx.x) * WARPS + warp) * TOKENS + in_warp;
  const bool here = token < args.tokens;
  const int64_t row = here ? token * args.experts : 0;  // the others do the first token's work and do not write it
  const Part<LANES, PER> part{lane, static_cast<int>(args.experts), SIMPLE || whole};
  float values[PER], probabilities[PER];
  wait_for_previous();
  part.load(args.logits + row, -INF, values);
  const float sum = activate<LANES, PER, SCORE>(values, probabilities).sum;
  const Divisor by(sum);
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    // `values` become what the weights are made of.
    if (SCORE == Score::sigmoid) values[i] = probabilities[i];
    probabilities[i] = SCORE == Score::sigmoid ? probabilities[i] / sum : by(probabilities[i]);
    if (SCORE == Score::softmax) values[i] = probabilities[i];
  }
  if (here) part.store(args.probabilities + row, probabilities);
  float* kept = shared[warp][in_warp];
  part.keep(kept, values);

  const int choices = static_cast<int>(args.choices);
  int expert = 0;
  uint32_t doubts = UINT32_MAX;  // lanes of the tokens for which sorting is not the answer
  __syncwarp();
  if (SIMPLE || sorting) {
    uint32_t ranks[PER], keys[PER], best[BEST];
    // Probabilities and sigmoids are in the order of their bits; where there is no expert they are 0.
    const bool plain = SCORE != Score::topk_softmax && (SIMPLE || args.correction == nullptr);
    if (plain) {
#pragma unroll
      for (int i = 0; i < PER; ++i) ranks[i] = __float_as_uint(values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < PER; ++i)
        ranks[i] = part.at(i) < args.experts ? rank_of(corrected(args, values[i], part.at(i))) : 0;
    }
#pragma unroll
    for (int i = 0; i < PER; ++i) keys[i] = (ranks[i] & ~NUMBER) | (NUMBER - (i / 4 * LANES * 4 + i % 4));
    best_of<LANES, PER>(keys, best, lane * 4);
    uint32_t mine = best[0];
#pragma unroll
    for (int i = 1; i < BEST; ++i)
      if (lane == i) mine = best[i];
    expert = static_cast<int>(NUMBER - (mine & NUMBER));
    // Keys that differ in the number alone may be of ranks that differ. Then either two of the chosen are not in their
    // order, or there are ranks above the last one's so near to it that one of them may not be among the chosen.
    uint32_t rank = 0;
    if (lane < choices) rank = plain ? __float_as_uint(kept[expert]) : rank_of(corrected(args, kept[expert], expert));
    const uint32_t before = __shfl_up_sync(0xffffffffu, rank, 1);
    const uint32_t last = __shfl_sync(0xffffffffu, rank, choices - 1, LANES);
    uint32_t near = UINT32_MAX;
#pragma unroll
    for (int i = 0; i < PER; ++i) near = min(near, ranks[i] - last - 1);
    doubts = __ballot_sync(0xffffffffu, near < NUMBER || (lane > 0 && lane < choices && before < rank));
  }
  if (doubts != 0) {
#pragma unroll 1
    for (int other = 0; other < TOKENS; ++other) {
      const uint32_t lanes = doubts >> (other * LANES);
      if ((LANES == 32 ? lanes : lanes & ((1u << LANES % 32) - 1)) == 0) continue;
      const int chosen = choose<ALL>(args, shared[warp][other]);
      const int its = __shfl_sync(0xffffffffu, chosen, lane);
      if (in_warp == other) expert = its;
    }
  }

  const bool mine = lane < choices;
  float weight = mine ? kept[expert] : 0.0f;
  if (SCORE == Score::topk_softmax) {
    const float greatest = max_of<LANES>(mine ? weight : -INF);
    weight = mine ? expf(weight - greatest) : 0.0f;
  }
  const float total = sum_of<LANES>(weight);
  if (SCORE == Score::topk_softmax) {
    weight /= total;
  } else if (args.normalise) {
    weight /= total + 1e-20f;
  }
  if (here && mine) {
    args.chosen[token * choices + lane] = expert;
    args.weights[token * choices + lane] = weight * args.scale;
  }
}

template <int LANES, int PER, Score SCORE>
__global__ void __launch_bounds__(THREADS) router_backward_kernel(const RouterBackward args, bool whole) {
  constexpr int TOKENS = 32 / LANES, ALL = LANES * PER;
  constexpr bool LATE = SCORE == Score::topk_softmax;
  __shared__ __align__(16) float shared[WARPS][TOKENS][ALL];
  const int lane = threadIdx.x % LANES, in_warp = threadIdx.x % 32 / LANES, warp = threadIdx.x / 32;
  const int64_t token = (static_cast<int64_t>(blockIdx.x) * WARPS + warp) * TOKENS + in_warp;
  const bool here = token < args.tokens;
  const int64_t row = here ? token * args.experts : 0;
  const Part<LANES, PER> part{lane, static_cast<int>(args.experts), whole};
  float logits[PER], values[PER], grads[PER];
  wait_for_previous();
  part.load(args.logits + row, -INF, logits);
  if (args.grad_probabilities != nullptr) {
    part.load(args.grad_probabilities + row, 0.0f, grads);
  } else {
#pragma unroll
    for (int i = 0; i < PER; ++i) grads[i] = 0.0f;
  }
  const bool mine = lane < args.choices;
  const int64_t place = (here ? token * args.choices : 0) + lane;
  const int expert = mine ? static_cast<int>(args.chosen[place]) : 0;
  float grad = mine ? args.grad_weights[place] * args.scale : 0.0f;
  const float logit = args.logits[row + expert];

  const auto [greatest, sum] = activate<LANES, PER, SCORE>(logits, values);
  const Divisor by(sum);
  // What this lane's weight was made of.
  float score;
  if (LATE) {
    score = mine ? logit : -INF;
    score = expf(score - max_of<LANES>(score));
  } else {
    score = SCORE == Score::sigmoid ? sigmoid(logit) : by(expf(logit - greatest));
    if (!mine) score = 0.0f;
  }
  if (LATE || args.normalise) {
    const float total = sum_of<LANES>(score) + (LATE ? 0.0f : 1e-20f);
    const float weight = score / total;
    const float mean = sum_of<LANES>(grad * weight);
    grad = LATE ? weight * (grad - mean) : (grad - mean) / total;
  }
  // Its gradient goes to the lane that has the expert.
  float* kept = shared[warp][in_warp];
  float direct[PER];
#pragma unroll
  for (int i = 0; i < PER; ++i) direct[i] = 0.0f;
  part.keep(kept, direct);
  __syncwarp();
  if (mine) kept[expert] = grad;  // no expert is chosen twice
  __syncwarp();
  part.recall(kept, direct);

  // Gradient of the probabilities and, by another way, of the scores, which with softmax are the probabilities.
  float product = 0.0f;
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    if (SCORE == Score::softmax) grads[i] += direct[i];
    logits[i] = SCORE == Score::sigmoid ? values[i] / sum : by(values[i]);  // the probabilities from here on
    product += grads[i] * logits[i];
  }
  product = sum_of<LANES>(product);
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    if (SCORE == Score::sigmoid) {
      grads[i] = ((grads[i] - product) / sum + direct[i]) * values[i] * (1.0f - values[i]);
    } else {
      grads[i] = (grads[i] - product) * logits[i] + (LATE ? direct[i] : 0.0f);
    }
  }
  if (here) part.store(args.grad_logits + row, grads);
}

// Calls body with lanes, experts of each and the score as constants.
template <class Body>
auto with_shape(int64_t experts, int64_t choices, Score score, Body&& body) {
  const auto go = [&](auto lanes, auto per) {
    if (score == Score::softmax) return body(lanes, per, std::integral_constant<Score, Score::softmax>{});
    if (score == Score::sigmoid) return body(lanes, per, std::integral_constant<Score, Score::sigmoid>{});
    return body(lanes, per, std::integral_constant<Score, Score::topk_softmax>{});
  };
  using std::integral_constant;
  if (experts <= 64 && choices <= BEST) return go(integral_constant<int, 8>{}, integral_constant<int, 8>{});
  if (experts <= 128 && choices <= BEST) return go(integral_constant<int, 8>{}, integral_constant<int, 16>{});
  if (experts <= 256) return go(integral_constant<int, 16>{}, integral_constant<int, 16>{});
  return go(integral_constant<int, 32>{}, integral_constant<int, 16>{});
}

}  // namespace

int router(const Router& args, Stream stream) {
  if (args.experts > MAX_EXPERTS || args.choices > MAX_CHOICES || args.groups > MAX_GROUPS)
    return static_cast<int>(cudaErrorInvalidValue);
  if (args.tokens == 0) return 0;
  const bool whole = args.experts % 4 == 0 && aligned({args.logits, args.probabilities});
  const bool sorting = args.choices <= BEST && args.groups_per_token == args.groups;
  return with_shape(args.experts, args.choices, args.score, [&](auto lanes, auto per, auto score) {
    constexpr int LANES = decltype(lanes)::value, PER = decltype(per)::value;
    constexpr Score SCORE = decltype(score)::value;
    const bool simple = whole && sorting && args.correction == nullptr;
    const auto kernel = simple ? router_kernel<LANES, PER, SCORE, true> : router_kernel<LANES, PER, SCORE, false>;
    return launch_early(kernel, grid(args.tokens, THREADS / LANES), THREADS, 0, stream, args, whole, sorting);
  });
}

int router_backward(const RouterBackward& args, Stream stream) {
  if (args.experts > MAX_EXPERTS || args.choices > MAX_CHOICES) return static_cast<int>(cudaErrorInvalidValue);
  if (args.tokens == 0) return 0;
  const bool whole = args.experts % 4 == 0 && aligned({args.logits, args.grad_logits}) &&
                     (args.grad_probabilities == nullptr || aligned({args.grad_probabilities}));
  return with_shape(args.experts, args.choices, args.score, [&](auto lanes, auto per, auto score) {
    constexpr int LANES = decltype(lanes)::value, PER = decltype(per)::value;
    constexpr Score SCORE = decltype(score)::value;
    return launch_early(router_backward_kernel<LANES, PER, SCORE>, grid(args.tokens, THREADS / LANES), THREADS, 0,
                        stream, args, whole);
  });
}

}  // namespace megatune::cuda
