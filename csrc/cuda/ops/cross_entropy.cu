// Cross-entropy of rows of logits in two passes: one for largest, sum and target, one for the gradient, in place;
// between them, where a vocabulary is split, the sums of its parts are put together. Long rows of 16 bits with their
// whole vocabulary have a kernel of their own on sm_90, in cross_entropy_cluster.cu, which reads them once.
//
// Blocks are small, so that a multiprocessor has many and some of them always read: in the first pass one for a row, in
// the second one for so much of a row as its threads hold at a time. The second pass begins with the last rows, which
// the L2 cache still has.

#include "cross_entropy_cluster.cuh"

#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "megatune/cuda_loss.h"

namespace megatune::cuda {

namespace {

constexpr int WARP = 32;
constexpr int THREADS = 128;      // of a block
constexpr int MAX_THREADS = 512;  // of one that has a long row, where there are few

// Vectors that a thread has under way at a time.
template <bool CAP>
constexpr int GROUP = CAP ? 2 : 4;

// The sums of some logits: largest, sum of exp(logit - largest), sum.
struct Partial {
  float most, total, plain;
};

// exp(x - centre), of which there are two for each logit: for 16 bits as a power of two, one multiply-add and one
// special function, with `shift` = shift_of(centre). As shift is rounded, it is exp(x - centre) / correction(centre).
template <class T>
constexpr bool FAST = sizeof(T) == 2;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LOWEST = -1e30f;  // below all logits but -infinity, and finite in units of 1 / LOG2_E too

__device__ inline float exp2_of(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

template <class T>
__device__ inline float shift_of(float centre) {
  return FAST<T> ? __fmul_rn(centre, LOG2_E) : centre;
}

template <class T>
__device__ inline float power(float x, float shift) {
  if constexpr (FAST<T>) return exp2_of(fmaf(x, LOG2_E, -shift));
  return expf(x - shift);
}

template <class T>
__device__ inline float correction(float centre) {
  return FAST<T> ? exp2_of(-fmaf(centre, LOG2_E, -shift_of<T>(centre))) : 1.0f;
}

// Two numbers side by side: one instruction for two where the type has 16 bits.
__device__ inline void put(float* to, float a, float b) { to[0] = a, to[1] = b; }
__device__ inline void put(__nv_bfloat16* to, float a, float b) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
  to[0] = both.x, to[1] = both.y;
}
__device__ inline void put(__half* to, float a, float b) {
  const __half2 both = __floats2half2_rn(a, b);
  to[0] = both.x, to[1] = both.y;
}

template <class T>
__device__ inline float tanh_of(float x) {
  if constexpr (sizeof(T) == 4) return tanhf(x);
  return 1.0f - __fdividef(2.0f, 1.0f + __expf((x > 40.0f ? 40.0f : x) * 2.0f));  // NaN stays NaN
}

template <class T, bool CAP>
__device__ inline float capped(float x, float cap) {
  if constexpr (CAP) return cap * tanh_of<T>(x * (1.0f / cap));
  return x;
}

// N logits more, rescaled together, once.
template <class T, bool CAP, int N>
__device__ inline void add(Partial& sums, const Vec<T, N>& x, const CrossEntropy& args, bool with_sum) {
  float values[N];
  float most = sums.most;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values[i] = capped<T, CAP>(to_float(x.at[i]), args.softcap);
    most = fmaxf(most, values[i]);
  }
  const float shift = shift_of<T>(most), before = shift_of<T>(sums.most) - shift;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) total += power<T>(values[i], shift);
  sums.total = sums.total * (FAST<T> ? exp2_of(before) : expf(before)) + total;
  sums.most = most;
  if (with_sum) {
    float plain = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) plain += values[i];
    sums.plain += plain;
  }
}

__device__ inline Partial warp_total(Partial mine) {
  float most = mine.most;
#pragma unroll
  for (int lane = WARP / 2; lane > 0; lane /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, lane));
  float total = mine.total * expf(mine.most - most), plain = mine.plain;
#pragma unroll
  for (int lane = WARP / 2; lane > 0; lane /= 2) {
    total += __shfl_xor_sync(0xffffffffu, total, lane);
    plain += __shfl_xor_sync(0xffffffffu, plain, lane);
  }
  return {most, total, plain};
}

// Over all threads of the block, given to its first warp, always in the same order.
__device__ inline Partial block_total(Partial mine) {
  __shared__ Partial shared[MAX_THREADS / WARP];
  const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  mine = warp_total(mine);
  if (lane == 0) shared[threadIdx.x / WARP] = mine;
  __syncthreads();
  if (lane < warps) {
    mine = shared[lane];
  } else {
    mine = {LOWEST, 0.0f, 0.0f};
  }
  return warp_total(mine);
}

// What a row's gradient is made of: power(logit, shift) * of_softmax - of_all, and less by of_label for the label.
struct Slopes {
  float shift, of_softmax, of_all, of_label;
};

// The derivative of tanh, from its value, of whose square nothing is rounded: near 1 the difference would show it.
__device__ inline float slope_of(float part) { return fmaf(-part, part, 1.0f); }

template <class T, bool CAP>
__device__ inline float gradient(float x, const Slopes& slopes, float cap) {
  if constexpr (CAP) {
    const float part = tanh_of<T>(x * (1.0f / cap));
    return (power<T>(cap * part, slopes.shift) * slopes.of_softmax - slopes.of_all) * slope_of(part);
  }
  return power<T>(x, slopes.shift) * slopes.of_softmax - slopes.of_all;
}

template <class T, bool CAP, int N>
__device__ inline Vec<T, N> gradients(const Vec<T, N>& x, const Slopes& slopes, float cap) {
  Vec<T, N> result;
#pragma unroll
  for (int i = 0; i < N; i += 2)
    put(result.at + i, gradient<T, CAP>(to_float(x.at[i]), slopes, cap),
        gradient<T, CAP>(to_float(x.at[i + 1]), slopes, cap));
  return result;
}

// Of the label's own logit.
template <class T, bool CAP>
__device__ inline T label_gradient(T logit, const Slopes& slopes, float cap) {
  const float part = CAP ? tanh_of<T>(to_float(logit) * (1.0f / cap)) : 0.0f;
  const float x = CAP ? cap * part : to_float(logit);
  const float grad = power<T>(x, slopes.shift) * slopes.of_softmax - slopes.of_all - slopes.of_label;
  return from_float<T>(CAP ? grad * slope_of(part) : grad);
}

// A row in 16-byte vectors, with what is before the first and after the last: less than a vector each, an element for
// some of the first threads.
template <class T, int N>
struct Row {
  T* logits;
  T* body;
  int vectors;
  int edge;  // this thread's element beside the vectors; -1: none

  __device__ Row(const CrossEntropy& args, int64_t number) {
    logits = static_cast<T*>(args.logits) + number * args.row_stride;
    const int vocab = static_cast<int>(args.vocab), thread = static_cast<int>(threadIdx.x);
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(logits) % 16) / static_cast<int>(sizeof(T));
    const int head = min((N - past) % N, vocab);
    body = logits + head;
    vectors = (vocab - head) / N;
    const int tail = vocab - head - vectors * N;
    edge = -1;
    if (thread < head) edge = thread;
    if (thread >= N && thread < N + tail) edge = vocab - tail + thread - N;
  }
};

// Losses of rows, and what gradients are made from: largest logit and sum of exp(logit - largest). (Their logsumexp is
// one number, but rounded; probabilities made from it would have that error times themselves.)
struct Finished {
  float* loss;    // [rows]
  float* joined;  // [rows, 2]

  __device__ void operator()(const CrossEntropy& args, int64_t row, const Partial& sums, float target) const {
    const float log_total = logf(sums.total), log_sum = sums.most + log_total;
    const float weight = args.weights == nullptr ? 1.0f : args.weights[row];
    float value = log_total + (sums.most - target) + args.z_loss * log_sum * log_sum;
    if (args.smoothing != 0.0f) value += args.smoothing * (target - sums.plain / static_cast<float>(args.size));
    loss[row] = args.labels[row] == args.ignore ? 0.0f : weight * value;
    joined[2 * row] = sums.most, joined[2 * row + 1] = sums.total;
  }
};

// What is sent to those who have the other columns of the vocabulary.
struct Sent {
  float* sums;  // [rows, 3], or with the sum of the logits [rows, 4]
  bool with_sum;

  __device__ void operator()(const CrossEntropy&, int64_t row, const Partial& mine, float target) const {
    float* to = sums + row * (with_sum ? 4 : 3);
    to[0] = mine.most, to[1] = mine.total, to[2] = target;
    if (with_sum) to[3] = mine.plain;
  }
};

template <class T, bool CAP, class Result>
__global__ void __launch_bounds__(MAX_THREADS)
    sums_kernel(const CrossEntropy args, const bool with_sum, const Result result) {
  constexpr int N = 16 / sizeof(T);
  const int64_t number = blockIdx.x, label = args.labels[number], column = label - args.first;
  if (label == args.ignore) {
    if (threadIdx.x == 0) result(args, number, {0.0f, 1.0f, 0.0f}, 0.0f);
    return;
  }
  const Row<T, N> row(args, number);
  float target = 0.0f;  // a label that is nowhere makes the loss NaN
  if (threadIdx.x == 0) {
    const bool here = column >= 0 && column < args.vocab, exists = label >= 0 && label < args.size;
    target = here ? capped<T, CAP>(to_float(row.logits[column]), args.softcap) : exists ? 0.0f : nanf("");
  }
  Partial mine{LOWEST, 0.0f, 0.0f};
  if (row.edge >= 0) {
    const Vec<T, 1> one{{row.logits[row.edge]}};
    add<T, CAP>(mine, one, args, with_sum);
  }
  const int threads = blockDim.x;
  for (int at = threadIdx.x; at < row.vectors; at += GROUP<CAP> * threads) {
    Vec<T, N> x[GROUP<CAP>];
#pragma unroll
    for (int i = 0; i < GROUP<CAP>; ++i)
      if (at + i * threads < row.vectors) x[i] = load<N>(row.body + (at + i * threads) * N);
#pragma unroll
    for (int i = 0; i < GROUP<CAP>; ++i)
      if (at + i * threads < row.vectors) add<T, CAP>(mine, x[i], args, with_sum);
  }
  if (mine.total > 0.0f) mine.total *= correction<T>(mine.most);  // else nothing was added, or NaN
  mine = block_total(mine);
  if (threadIdx.x == 0) result(args, number, mine, target);
}

// Puts the sums of the parts of a vocabulary together. sums: [parts, rows, 3 or 4].
__global__ void __launch_bounds__(THREADS)
    join_kernel(const CrossEntropy args, const float* sums, const int64_t parts, const Finished result) {
  const int64_t row = int64_t{blockIdx.x} * THREADS + threadIdx.x, numbers = args.smoothing != 0.0f ? 4 : 3;
  if (row >= args.rows) return;
  Partial all{LOWEST, 0.0f, 0.0f};
  float target = 0.0f;
  for (int64_t part = 0; part < parts; ++part) all.most = fmaxf(all.most, sums[(part * args.rows + row) * numbers]);
  for (int64_t part = 0; part < parts; ++part) {
    const float* from = sums + (part * args.rows + row) * numbers;
    all.total += from[1] * expf(from[0] - all.most);
    target += from[2];
    if (numbers == 4) all.plain += from[3];
  }
  result(args, row, all, target);
}

// `parts` blocks for each row.
template <class T, bool CAP>
__global__ void __launch_bounds__(THREADS)
    grad_kernel(const CrossEntropy args, const float* joined, const unsigned parts) {
  constexpr int N = 16 / sizeof(T);
  const int64_t number = args.rows - 1 - blockIdx.x / parts, label = args.labels[number], column = label - args.first;
  const Row<T, N> row(args, number);
  const int part = static_cast<int>(parts - 1 - blockIdx.x % parts), each = (row.vectors + parts - 1) / parts;
  const int begin = part * each + threadIdx.x, end = min(row.vectors, (part + 1) * each);
  const bool has_edge = part == 0 && row.edge >= 0;
  Vec<T, N> x[GROUP<CAP>];
#pragma unroll
  for (int i = 0; i < GROUP<CAP>; ++i)
    if (begin + i * THREADS < end) x[i] = load<N>(row.body + (begin + i * THREADS) * N);
  if (label == args.ignore) {
    Vec<T, N> zeros;
#pragma unroll
    for (int i = 0; i < N; ++i) zeros.at[i] = from_float<T>(0.0f);
    for (int at = begin; at < end; at += THREADS) store_whole(row.body + at * N, zeros);
    if (has_edge) row.logits[row.edge] = from_float<T>(0.0f);
    return;
  }
  const float weight = args.weights == nullptr ? 1.0f : args.weights[number];
  const float most = joined[2 * number], total = joined[2 * number + 1], log_sum = most + logf(total);
  const Slopes slopes{shift_of<T>(most), weight * (1.0f + 2.0f * args.z_loss * log_sum) * correction<T>(most) / total,
                      weight * (args.smoothing / static_cast<float>(args.size)), weight * (1.0f - args.smoothing)};
  // The label's own entry is written by the thread that writes its vector, once more, rounded once.
  const int own = column >= 0 && column < args.vocab ? static_cast<int>(column) : -1;
  const int head = static_cast<int>(row.body - row.logits), vector = own < head ? -1 : (own - head) / N;
#pragma unroll
  for (int i = 0; i < GROUP<CAP>; ++i) {
    const int at = begin + i * THREADS;
    if (at >= end) continue;
    T target = from_float<T>(0.0f);
    if (at == vector) target = row.logits[own];
    store_whole(row.body + at * N, gradients<T, CAP>(x[i], slopes, args.softcap));
    if (at == vector) row.logits[own] = label_gradient<T, CAP>(target, slopes, args.softcap);
  }
  if (!has_edge) return;
  const T logit = row.logits[row.edge];
  row.logits[row.edge] = row.edge == own ? label_gradient<T, CAP>(logit, slopes, args.softcap)
                                         : from_float<T>(gradient<T, CAP>(to_float(logit), slopes, args.softcap));
}

int64_t vectors_of(const CrossEntropy& args) { return args.vocab / (args.type == Type::f32 ? 4 : 8); }

// Calls body(null pointer of the logits' type, whether there is a soft cap).
template <class Body>
int with_kind(const CrossEntropy& args, Body&& body) {
  if (args.rows == 0) return 0;
  return with_type(args.type, [&](auto* type) {
    if (args.softcap == 0.0f) return body(type, std::false_type());
    return body(type, std::true_type());
  });
}

template <class Result>
int sum(const CrossEntropy& args, bool with_sum, const Result& result, Stream stream) {
  return with_kind(args, [&](auto* type, auto cap) {
    using T = std::remove_pointer_t<decltype(type)>;
    // As many as hold the row, up to THREADS, or, where rows are few, so many that these occupy the device.
    const int most = args.rows < 16 * multiprocessors() ? MAX_THREADS : THREADS;
    int threads = WARP;
    while (threads < most && threads * GROUP<cap> < vectors_of(args)) threads *= 2;
    sums_kernel<T, cap><<<static_cast<unsigned>(args.rows), threads, 0, stream>>>(args, with_sum, result);
    return launched();
  });
}

}  // namespace

int cross_entropy(const CrossEntropy& args, bool write_grad, float* loss, float* joined, Stream stream) {
  if (write_grad && args.rows > 0 && cluster_takes(args)) return cross_entropy_cluster(args, loss, stream);
  const int error = sum(args, args.smoothing != 0.0f, Finished{loss, joined}, stream);
  return error != 0 || !write_grad ? error : cross_entropy_grad(args, joined, stream);
}

int cross_entropy_sums(const CrossEntropy& args, bool with_sum, float* sums, Stream stream) {
  return sum(args, with_sum, Sent{sums, with_sum}, stream);
}

int cross_entropy_join(const CrossEntropy& args, const float* sums, int64_t parts, float* loss, float* joined,
                       Stream stream) {
  if (args.rows == 0) return 0;
  join_kernel<<<grid(args.rows, THREADS), THREADS, 0, stream>>>(args, sums, parts, {loss, joined});
  return launched();
}

int cross_entropy_grad(const CrossEntropy& args, const float* joined, Stream stream) {
  return with_kind(args, [&](auto* type, auto cap) {
    using T = std::remove_pointer_t<decltype(type)>;
    const unsigned parts = std::max(1u, grid(vectors_of(args), THREADS * GROUP<cap>));
    grad_kernel<T, cap><<<static_cast<unsigned>(args.rows) * parts, THREADS, 0, stream>>>(args, joined, parts);
    return launched();
  });
}

}  // namespace megatune::cuda
