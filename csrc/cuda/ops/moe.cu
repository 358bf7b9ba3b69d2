// Mixture of experts: the router's choice, rows of tokens to their experts and back. No atomics: every sum is made in
// one fixed order.

#include <type_traits>

#include "../common/launch.cuh"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "megatune/cuda_tokens.h"

namespace megatune::cuda {

namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr float INF = __builtin_huge_valf();

// ---- router: a warp for each token, its experts dealt out to the lanes (expert = i * 32 + lane, i < PER)

__device__ inline float warp_max(float value) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, lane));
  return value;
}

// Numbers in the order of the floats, all above 0: which is for those that cannot be chosen any more.
__device__ inline uint32_t rank_of(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);  // -0 is equal to 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The lowest number with the greatest rank among the lanes' candidates, given to all of them.
__device__ inline int warp_best(uint32_t rank, int at) {
  const uint32_t greatest = __reduce_max_sync(0xffffffffu, rank);
  return static_cast<int>(__reduce_min_sync(0xffffffffu, rank == greatest ? static_cast<uint32_t>(at) : UINT32_MAX));
}

// Logits -> exp(logit - greatest) or sigmoids, and their sum over the experts. Lanes without an expert hold 0.
template <int PER>
__device__ float activate(const float (&logits)[PER], float (&values)[PER], int64_t experts, bool sigmoid) {
  const int lane = threadIdx.x % 32;
  float greatest = -INF;
#pragma unroll
  for (int i = 0; i < PER; ++i)
    if (i * 32 + lane < experts) greatest = fmaxf(greatest, logits[i]);
  greatest = warp_max(greatest);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const bool here = i * 32 + lane < experts;
    const float value = sigmoid ? 1.0f / (1.0f + expf(-logits[i])) : expf(logits[i] - greatest);
    values[i] = here ? value : 0.0f;
    sum += values[i];
  }
  return row_sum(sum, 32, nullptr);
}

template <int PER>
__device__ void load_experts(const float* from, int64_t experts, float (&values)[PER]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < PER; ++i) values[i] = i * 32 + lane < experts ? from[i * 32 + lane] : 0.0f;
}

// Scores of the experts outside the best groups become -inf; a group's score is the sum of its best two.
template <int PER>
__device__ void limit_groups(const Router& args, float (&scores)[PER], float* shared) {
  const int lane = threadIdx.x % 32, size = static_cast<int>(args.experts / args.groups);
#pragma unroll
  for (int i = 0; i < PER; ++i)
    if (i * 32 + lane < args.experts) shared[i * 32 + lane] = scores[i];
  __syncwarp();
  float first = -INF, second = -INF;
  if (lane < args.groups) {
    for (int i = 0; i < size; ++i) {
      const float score = shared[lane * size + i];
      if (score > first) {
        second = first, first = score;
      } else if (score > second) {
        second = score;
      }
    }
  }
  __syncwarp();  // the next token's scores come only now
  const float mine = size == 1 ? first : first + second;
  bool free = lane < args.groups;
  uint32_t allowed = 0;
  for (int64_t pick = 0; pick < args.groups_per_token; ++pick) {
    const int best = warp_best(free ? rank_of(mine) : 0, lane);
    if (best == lane) free = false;
    allowed |= 1u << best;
  }
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int expert = i * 32 + lane;
    if (expert < args.experts && !(allowed >> (expert / size) & 1u)) scores[i] = -INF;
  }
}

template <int PER>
__global__ void __launch_bounds__(THREADS) router_kernel(const Router args) {
  __shared__ float shared[WARPS][PER * 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * WARPS + warp; token < args.tokens;
       token += static_cast<int64_t>(gridDim.x) * WARPS) {
    float logits[PER], values[PER], scores[PER];
    load_experts(args.logits + token * args.experts, args.experts, logits);
    const bool sigmoid = args.score == Score::sigmoid;
    const float sum = activate(logits, values, args.experts, sigmoid);
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int expert = i * 32 + lane;
      const float probability = values[i] / sum;
      if (expert < args.experts) args.probabilities[token * args.experts + expert] = probability;
      // What the weights are made of.
      values[i] = args.score == Score::softmax ? probability : sigmoid ? values[i] : logits[i];
      scores[i] = values[i];
      if (args.correction != nullptr && expert < args.experts) scores[i] += args.correction[expert];
      if (isnan(scores[i])) scores[i] = INF;  // it shall be seen in the weights
    }
    if (args.groups_per_token < args.groups) limit_groups(args, scores, shared[warp]);

    uint32_t ranks[PER];
#pragma unroll
    for (int i = 0; i < PER; ++i) ranks[i] = i * 32 + lane < args.experts ? rank_of(scores[i]) : 0;
    float weight = 0.0f, total = 0.0f, greatest = 0.0f;
    int64_t chosen = 0;
    for (int choice = 0; choice < args.choices; ++choice) {
      uint32_t rank = ranks[0];
      float value = values[0];
      int at = lane;
#pragma unroll
      for (int i = 1; i < PER; ++i)
        if (ranks[i] > rank) rank = ranks[i], value = values[i], at = i * 32 + lane;
      const int best = warp_best(rank, at);
#pragma unroll
      for (int i = 0; i < PER; ++i)
        if (best == i * 32 + lane) ranks[i] = 0;
      value = __shfl_sync(0xffffffffu, value, best % 32);
      if (choice == 0) greatest = value;
      if (args.score == Score::topk_softmax) greatest = fmaxf(greatest, value);
      if (lane == choice) weight = value, chosen = best;
    }
    const bool mine = lane < args.choices;
    if (args.score == Score::topk_softmax) weight = expf(weight - greatest);
    total = row_sum(mine ? weight : 0.0f, 32, nullptr);
    if (args.score == Score::topk_softmax) {
      weight /= total;
    } else if (args.normalise) {
      weight /= total + 1e-20f;
    }
    if (mine) {
      args.chosen[token * args.choices + lane] = chosen;
      args.weights[token * args.choices + lane] = weight * args.scale;
    }
  }
}

template <int PER>
__global__ void __launch_bounds__(THREADS) router_backward_kernel(const RouterBackward args) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * WARPS + warp; token < args.tokens;
       token += static_cast<int64_t>(gridDim.x) * WARPS) {
    float logits[PER], values[PER], grads[PER];
    load_experts(args.logits + token * args.experts, args.experts, logits);
    const bool sigmoid = args.score == Score::sigmoid, late = args.score == Score::topk_softmax;
    const float sum = activate(logits, values, args.experts, sigmoid);  // values / sum: probabilities
    const bool mine = lane < args.choices;
    const int expert = mine ? static_cast<int>(args.chosen[token * args.choices + lane]) : 0;
    float grad = mine ? args.grad_weights[token * args.choices + lane] * args.scale : 0.0f;
    // What this lane's weight was made of.
    const float logit = args.logits[token * args.experts + expert];
    float score = 0.0f;
    if (late) {
      score = mine ? logit : -INF;
      score = expf(score - warp_max(score));
    } else if (sigmoid) {
      score = mine ? 1.0f / (1.0f + expf(-logit)) : 0.0f;
    } else {
#pragma unroll
      for (int i = 0; i < PER; ++i) {  // the exponential is with another lane
        const float other = __shfl_sync(0xffffffffu, values[i], expert % 32);
        if (mine && expert / 32 == i) score = other / sum;
      }
    }
    if (late || args.normalise) {
      const float total = row_sum(score, 32, nullptr) + (late ? 0.0f : 1e-20f);
      const float weight = score / total;
      const float mean = row_sum(grad * weight, 32, nullptr);
      grad = late ? weight * (grad - mean) : (grad - mean) / total;
    }
    // Gradient of the probabilities and, by another way, of the scores.
    float product = 0.0f;
    if (args.grad_probabilities != nullptr) {
      load_experts(args.grad_probabilities + token * args.experts, args.experts, grads);
    } else {
#pragma unroll
      for (int i = 0; i < PER; ++i) grads[i] = 0.0f;
    }
    float direct[PER];
#pragma unroll
    for (int i = 0; i < PER; ++i) direct[i] = 0.0f;
    for (int choice = 0; choice < args.choices; ++choice) {
      const int at = __shfl_sync(0xffffffffu, expert, choice);
      const float part = __shfl_sync(0xffffffffu, grad, choice);
#pragma unroll
      for (int i = 0; i < PER; ++i)
        if (at == i * 32 + lane) direct[i] += part;
    }
    // Softmax: probabilities are the scores.
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      if (args.score == Score::softmax) grads[i] += direct[i];
      product += grads[i] * (values[i] / sum);
    }
    product = row_sum(product, 32, nullptr);
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      float result;
      if (sigmoid) {
        result = ((grads[i] - product) / sum + direct[i]) * values[i] * (1.0f - values[i]);
      } else {
        result = (grads[i] - product) * (values[i] / sum) + (late ? direct[i] : 0.0f);
      }
      if (i * 32 + lane < args.experts) args.grad_logits[token * args.experts + i * 32 + lane] = result;
    }
  }
}

// Calls body with the number of experts of a lane as a constant.
template <class Body>
void with_experts(int64_t experts, Body&& body) {
  if (experts <= 64) return body(std::integral_constant<int, 2>());
  if (experts <= 128) return body(std::integral_constant<int, 4>());
  if (experts <= 256) return body(std::integral_constant<int, 8>());
  body(std::integral_constant<int, 16>());
}

// ---- rows: threadIdx.x columns, .y rows; blockIdx.y the next columns

constexpr int AT_ONCE = 4;  // loads of a thread that are under way together

// What is written once and read by another kernel, if at all: the first to leave the cache.
template <class T, int N>
__device__ inline void store_last(T* to, const Vec<T, N>& values) {
  if constexpr (sizeof(values) == 16) {
    int4 words;
    memcpy(&words, &values, sizeof words);
    __stcs(reinterpret_cast<int4*>(to), words);
  } else {
    store(to, values);
  }
}

struct Tiles {
  dim3 blocks, block;
};

Tiles tiles(int64_t rows, int64_t vectors, int64_t each) {
  unsigned columns = 1;
  while (columns < THREADS && columns < vectors) columns *= 2;
  // Narrower blocks where the last one across would be half empty.
  while (columns > 32 && vectors % columns != 0 && vectors % columns <= columns / 2) columns /= 2;
  const unsigned many = THREADS / columns;
  return {dim3(grid(rows, many * each), static_cast<unsigned>((vectors + columns - 1) / columns)), dim3(columns, many)};
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS) take_kernel(const TakeRows args) {
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (column >= args.width) return;
  const int64_t step = static_cast<int64_t>(blockDim.y) * AT_ONCE;
  for (int64_t first = blockIdx.x * step + threadIdx.y; first < args.rows; first += gridDim.x * step) {
    Vec<T, N> values[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int64_t row = first + static_cast<int64_t>(i) * blockDim.y;
      if (row >= args.rows) continue;
      const int64_t at = args.index[row];
      if (at >= 0 && at < args.x_rows) {
        values[i] = load<N>(static_cast<const T*>(args.x) + at * args.stride + column);
      } else {
#pragma unroll
        for (int j = 0; j < N; ++j) values[i].at[j] = from_float<T>(0.0f);
      }
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int64_t row = first + static_cast<int64_t>(i) * blockDim.y;
      if (row < args.rows) store(static_cast<T*>(args.y) + row * args.width + column, values[i]);
    }
  }
}

// Where a choice's row is; -1: nowhere.
__device__ inline int64_t place_of(const int64_t* place, int64_t token, int64_t choice, int64_t choices, int64_t rows) {
  const int64_t at = choice < choices ? place[token * choices + choice] : -1;
  return at < rows ? at : -1;
}

// A token's vectors are read once for all its choices.
template <class T, int N>
__global__ void __launch_bounds__(THREADS) copy_kernel(const CopyRows args) {
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (column >= args.width) return;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; token < args.tokens;
       token += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const auto values = load<N>(static_cast<const T*>(args.x) + token * args.stride + column);
    constexpr int PLACES = 2 * AT_ONCE;
    for (int64_t first = 0; first < args.choices; first += PLACES) {
      int64_t at[PLACES];
#pragma unroll
      for (int i = 0; i < PLACES; ++i) at[i] = place_of(args.place, token, first + i, args.choices, args.row_count);
#pragma unroll
      for (int i = 0; i < PLACES; ++i)
        if (at[i] >= 0) store_last(static_cast<T*>(args.y) + at[i] * args.width + column, values);
    }
  }
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS) sum_kernel(const SumChoices args) {
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (column >= args.width) return;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; token < args.tokens;
       token += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    Vec<float, N> sum;
#pragma unroll
    for (int j = 0; j < N; ++j) sum.at[j] = 0.0f;
    for (int64_t first = 0; first < args.choices; first += AT_ONCE) {
      int64_t at[AT_ONCE];
      float weights[AT_ONCE];
      Vec<T, N> values[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        at[i] = place_of(args.place, token, first + i, args.choices, args.row_count);
        weights[i] = 1.0f;
        if (args.weights != nullptr && at[i] >= 0) weights[i] = args.weights[token * args.choices + first + i];
      }
      // Another row where there is none: without a condition all loads are under way together.
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i)
        values[i] = load<N>(static_cast<const T*>(args.rows) + max(at[i], int64_t{0}) * args.stride + column);
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        if (at[i] < 0) continue;
        const auto wide = widen(values[i]);
#pragma unroll
        for (int j = 0; j < N; ++j) sum.at[j] += wide.at[j] * weights[i];
      }
    }
    store_whole(static_cast<T*>(args.y) + token * args.width + column, narrow<T>(sum));
  }
}

// A block for each token.
template <class T, int N>
__global__ void __launch_bounds__(THREADS, 4) combine_backward_kernel(const CombineBackward args) {
  __shared__ float shared[WARPS][AT_ONCE];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t token = blockIdx.x; token < args.tokens; token += gridDim.x) {
    for (int64_t first = 0; first < args.choices; first += AT_ONCE) {
      int64_t at[AT_ONCE];
      float weights[AT_ONCE], products[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        at[i] = place_of(args.place, token, first + i, args.choices, args.row_count);
        weights[i] = at[i] >= 0 ? args.weights[token * args.choices + first + i] : 0.0f;
        products[i] = 0.0f;
      }
      for (int64_t column = static_cast<int64_t>(threadIdx.x) * N; column < args.width; column += THREADS * N) {
        const auto grad = widen(load<N>(static_cast<const T*>(args.grad) + token * args.grad_stride + column));
        if (args.rows != nullptr) {
          Vec<T, N> rows[AT_ONCE];
#pragma unroll
          for (int i = 0; i < AT_ONCE; ++i)
            if (at[i] >= 0) rows[i] = load<N>(static_cast<const T*>(args.rows) + at[i] * args.row_stride + column);
#pragma unroll
          for (int i = 0; i < AT_ONCE; ++i) {
            if (at[i] < 0) continue;
            const auto wide = widen(rows[i]);
#pragma unroll
            for (int j = 0; j < N; ++j) products[i] += grad.at[j] * wide.at[j];
          }
        }
        if (args.grad_rows == nullptr) continue;
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
          if (at[i] < 0) continue;
          Vec<float, N> scaled;
#pragma unroll
          for (int j = 0; j < N; ++j) scaled.at[j] = grad.at[j] * weights[i];
          store_whole(static_cast<T*>(args.grad_rows) + at[i] * args.width + column, narrow<T>(scaled));
        }
      }
      if (args.grad_weights == nullptr) continue;  // the same for all threads
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const float product = row_sum(products[i], 32, nullptr);
        if (lane == i) shared[warp][i] = product;
      }
      __syncthreads();
      if (threadIdx.x < AT_ONCE && first + threadIdx.x < args.choices) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) sum += shared[i][threadIdx.x];
        args.grad_weights[token * args.choices + first + threadIdx.x] = sum;
      }
      __syncthreads();
    }
  }
}

}  // namespace

int router(const Router& args, Stream stream) {
  if (args.experts > MAX_EXPERTS || args.choices > MAX_CHOICES || args.groups > MAX_GROUPS)
    return static_cast<int>(cudaErrorInvalidValue);
  if (args.tokens == 0) return 0;
  with_experts(args.experts, [&](auto per) {
    router_kernel<decltype(per)::value><<<grid(args.tokens, WARPS), THREADS, 0, stream>>>(args);
  });
  return launched();
}

int router_backward(const RouterBackward& args, Stream stream) {
  if (args.experts > MAX_EXPERTS || args.choices > MAX_CHOICES) return static_cast<int>(cudaErrorInvalidValue);
  if (args.tokens == 0) return 0;
  with_experts(args.experts, [&](auto per) {
    router_backward_kernel<decltype(per)::value><<<grid(args.tokens, WARPS), THREADS, 0, stream>>>(args);
  });
  return launched();
}

int take_rows(const TakeRows& args, Stream stream) {
  if (args.rows == 0 || args.width == 0) return 0;
  with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    const bool vectors = args.width % N == 0 && args.stride % N == 0 && aligned({args.x, args.y});
    const Tiles shape = tiles(args.rows, args.width / (vectors ? N : 1), AT_ONCE);
    if (vectors) {
      take_kernel<T, N><<<shape.blocks, shape.block, 0, stream>>>(args);
    } else {
      take_kernel<T, 1><<<shape.blocks, shape.block, 0, stream>>>(args);
    }
  });
  return launched();
}

int sum_choices(const SumChoices& args, Stream stream) {
  if (args.tokens == 0 || args.width == 0) return 0;
  if (args.row_count == 0) {
    const size_t bytes = args.tokens * args.width * (args.type == Type::f32 ? 4 : 2);
    return static_cast<int>(cudaMemsetAsync(args.y, 0, bytes, stream));
  }
  with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    const bool vectors = args.width % N == 0 && args.stride % N == 0 && aligned({args.rows, args.y});
    const Tiles shape = tiles(args.tokens, args.width / (vectors ? N : 1), 1);
    if (vectors) {
      sum_kernel<T, N><<<shape.blocks, shape.block, 0, stream>>>(args);
    } else {
      sum_kernel<T, 1><<<shape.blocks, shape.block, 0, stream>>>(args);
    }
  });
  return launched();
}

int copy_rows(const CopyRows& args, Stream stream) {
  if (args.tokens == 0 || args.width == 0 || args.row_count == 0) return 0;
  with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    const bool vectors = args.width % N == 0 && args.stride % N == 0 && aligned({args.x, args.y});
    const Tiles shape = tiles(args.tokens, args.width / (vectors ? N : 1), 1);
    if (vectors) {
      copy_kernel<T, N><<<shape.blocks, shape.block, 0, stream>>>(args);
    } else {
      copy_kernel<T, 1><<<shape.blocks, shape.block, 0, stream>>>(args);
    }
  });
  return launched();
}

int combine_backward(const CombineBackward& args, Stream stream) {
  if (args.tokens == 0) return 0;
  with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    const bool vectors = args.width % N == 0 && args.grad_stride % N == 0 && args.row_stride % N == 0 &&
                         aligned({args.grad, args.rows, args.grad_rows});
    if (vectors) {
      combine_backward_kernel<T, N><<<grid(args.tokens, 1), THREADS, 0, stream>>>(args);
    } else {
      combine_backward_kernel<T, 1><<<grid(args.tokens, 1), THREADS, 0, stream>>>(args);
    }
  });
  return launched();
}

}  // namespace megatune::cuda
