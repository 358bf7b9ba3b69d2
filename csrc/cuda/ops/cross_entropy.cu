// Cross-entropy of rows of logits: one pass for largest, sum and target, one for the gradient, in place.
//
// A block has a row. What fits stays on the multiprocessor between the passes: CACHED vectors of each thread in
// registers, then as much as there is shared memory (together a vocabulary of 128,256 in bf16, 250 KB, on sm_90); the
// rest of the row is read again, from its end, where the L2 cache still has it. Each thread keeps and reads its own
// vectors only, so nobody waits for shared memory. Loss and gradient of rows of 16 bits without soft cap and smoothing
// have a kernel of their own for sm_90, in cross_entropy_cluster.cu.

#include "cross_entropy_cluster.cuh"

#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "megatune/cuda_loss.h"

namespace megatune::cuda {

namespace {

constexpr int MAX_THREADS = 1024;
constexpr int CACHED = 2;  // vectors that a thread keeps in registers
constexpr int WARP = 32;

// Vectors that a thread has under way at a time; more do not fit into registers.
template <bool CAP>
constexpr int GROUP = CAP ? 2 : 3;

struct Outputs {
  float* loss;             // [rows]
  float* sums;             // [rows, numbers]; null: the whole vocabulary is here, and the loss is wanted
  const float* log_sums;   // [rows], given
  int numbers;
  bool write_grad;
  int slots;  // vectors of a row that fit into shared memory
};

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
  if constexpr (CAP) return cap * tanh_of<T>(x / cap);
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

// Over all threads of the block, given to all of them, always in the same order. shared: for each warp; all must have
// read what was in it before.
__device__ inline Partial block_total(Partial mine, Partial* shared) {
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

template <class T, bool CAP>
__device__ inline float gradient(float x, const Slopes& slopes, float cap) {
  if constexpr (CAP) {
    const float part = tanh_of<T>(x / cap);
    return (power<T>(cap * part, slopes.shift) * slopes.of_softmax - slopes.of_all) * (1.0f - part * part);
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

// A row in 16-byte vectors, with what is before the first and after the last: less than a vector each, an element for
// some of the threads.
template <class T, int N>
struct Row {
  T* logits;
  T* body;
  int vectors;
  int edge;  // this thread's element beside the vectors; -1: none

  __device__ Row(const CrossEntropy& args, int64_t row) {
    logits = static_cast<T*>(args.logits) + row * args.row_stride;
    const int vocab = static_cast<int>(args.vocab), thread = static_cast<int>(threadIdx.x);
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(logits) % 16) / static_cast<int>(sizeof(T));
    const int head = min((N - past) % N, vocab);
    body = logits + head;
    vectors = (vocab - head) / N;
    const int tail = vocab - head - vectors * N;
    edge = -1;
    if (thread < head) edge = thread;
    if (thread >= WARP && thread < WARP + tail) edge = vocab - tail + thread - WARP;
  }
};

template <class T, int N>
__device__ void write_zeros(const Row<T, N>& row) {
  Vec<T, N> zeros;
#pragma unroll
  for (int i = 0; i < N; ++i) zeros.at[i] = from_float<T>(0.0f);
  for (int at = threadIdx.x; at < row.vectors; at += blockDim.x) store(row.body + at * N, zeros);
  if (row.edge >= 0) row.logits[row.edge] = from_float<T>(0.0f);
}

// The first pass over a row; `cached` and `kept` hold what fits of it afterwards.
template <class T, bool CAP, int N>
__device__ Partial sums_of(const Row<T, N>& row, const CrossEntropy& args, bool with_sum, Vec<T, N> (&cached)[CACHED],
                           Vec<T, N>* kept, int slots) {
  Partial sums{LOWEST, 0.0f, 0.0f};
  const int threads = blockDim.x, near = CACHED * threads + slots;
#pragma unroll
  for (int i = 0; i < CACHED; ++i) {
    const int at = threadIdx.x + i * threads;
    if (at < row.vectors) cached[i] = load<N>(row.body + at * N);
  }
  if (row.edge >= 0) {
    const Vec<T, 1> one{{row.logits[row.edge]}};
    add<T, CAP>(sums, one, args, with_sum);
  }
#pragma unroll
  for (int i = 0; i < CACHED; ++i)
    if (static_cast<int>(threadIdx.x) + i * threads < row.vectors) add<T, CAP>(sums, cached[i], args, with_sum);
  int at = threadIdx.x + CACHED * threads;
  for (; at + (GROUP<CAP> - 1) * threads < row.vectors; at += GROUP<CAP> * threads) {
    Vec<T, N> x[GROUP<CAP>];
#pragma unroll
    for (int i = 0; i < GROUP<CAP>; ++i) x[i] = load<N>(row.body + (at + i * threads) * N);
#pragma unroll
    for (int i = 0; i < GROUP<CAP>; ++i)
      if (at + i * threads < near) kept[at + (i - CACHED) * threads] = x[i];
#pragma unroll
    for (int i = 0; i < GROUP<CAP>; ++i) add<T, CAP>(sums, x[i], args, with_sum);
  }
  for (; at < row.vectors; at += threads) {
    const Vec<T, N> x = load<N>(row.body + at * N);
    if (at < near) kept[at - CACHED * threads] = x;
    add<T, CAP>(sums, x, args, with_sum);
  }
  if (sums.total > 0.0f) sums.total *= correction<T>(sums.most);  // else nothing was added, or NaN
  return sums;
}

// The second pass where the first has left `cached` and `kept`: the end of the row first.
template <class T, bool CAP, int N>
__device__ void write_grad(const Row<T, N>& row, const Slopes& slopes, float cap, const Vec<T, N> (&cached)[CACHED],
                           const Vec<T, N>* kept, int slots) {
  const int threads = blockDim.x, thread = threadIdx.x, near = CACHED * threads + slots;
  int at = thread < row.vectors ? thread + (row.vectors - 1 - thread) / threads * threads : -1;
  for (; at >= CACHED * threads; at -= threads) {
    const Vec<T, N> x = at < near ? kept[at - CACHED * threads] : load<N>(row.body + at * N);
    store(row.body + at * N, gradients<T, CAP>(x, slopes, cap));
  }
#pragma unroll
  for (int i = 0; i < CACHED; ++i)
    if (thread + i * threads < row.vectors)
      store(row.body + (thread + i * threads) * N, gradients<T, CAP>(cached[i], slopes, cap));
}

// The gradient where the sums are known: the only pass.
template <class T, bool CAP, int N>
__device__ void write_grad(const Row<T, N>& row, const Slopes& slopes, float cap) {
  const int threads = blockDim.x;
  int at = threadIdx.x;
  for (; at + (GROUP<CAP> - 1) * threads < row.vectors; at += GROUP<CAP> * threads) {
    Vec<T, N> x[GROUP<CAP>];
#pragma unroll
    for (int i = 0; i < GROUP<CAP>; ++i) x[i] = load<N>(row.body + (at + i * threads) * N);
#pragma unroll
    for (int i = 0; i < GROUP<CAP>; ++i)
      store(row.body + (at + i * threads) * N, gradients<T, CAP>(x[i], slopes, cap));
  }
  for (; at < row.vectors; at += threads)
    store(row.body + at * N, gradients<T, CAP>(load<N>(row.body + at * N), slopes, cap));
}

// The beginning of a row on its way to the L2 cache while the block still computes: a line for each thread, at 1024 of
// them half of a row of 128,256 numbers of 16 bits, and for all multiprocessors together less than the cache holds.
template <class T>
__device__ inline void prefetch(const CrossEntropy& args, int64_t number) {
  const T* at = static_cast<const T*>(args.logits) + number * args.row_stride + threadIdx.x * (128 / sizeof(T));
  if (threadIdx.x * (128 / sizeof(T)) < args.vocab) asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

// KNOWN: the sums are, and the gradient alone is wanted.
template <class T, bool CAP, bool KNOWN>
__global__ void __launch_bounds__(MAX_THREADS) cross_entropy_kernel(const CrossEntropy args, const Outputs out) {
  constexpr int N = 16 / sizeof(T);
  extern __shared__ uint4 slots[];
  __shared__ Partial shared[WARP];
  Vec<T, N>* kept = reinterpret_cast<Vec<T, N>*>(slots);
  const bool split = out.sums != nullptr, with_sum = split ? out.numbers == 4 : args.smoothing != 0.0f;
  int64_t next = blockIdx.x < args.rows ? args.labels[blockIdx.x] : 0;
  // What is asked of a row is the same for all threads of the block: they meet at every barrier.
  for (int64_t number = blockIdx.x; number < args.rows; number += gridDim.x) {
    const Row<T, N> row(args, number);
    const int64_t label = next, column = label - args.first, after = number + gridDim.x;
    const bool here = column >= 0 && column < args.vocab;
    if (after < args.rows) next = args.labels[after];  // it is there when it is needed
    if (label == args.ignore) {
      if (KNOWN || out.write_grad) write_zeros(row);
      if (threadIdx.x == 0 && !KNOWN) {
        if (split) {
          float* to = out.sums + number * out.numbers;
          to[0] = 0.0f, to[1] = 1.0f, to[2] = 0.0f;
          if (with_sum) to[3] = 0.0f;
        } else {
          out.loss[number] = 0.0f;
        }
      }
      continue;
    }
    // Read before the gradient takes its place; used late, so that nobody waits for it.
    const T own = here ? row.logits[column] : from_float<T>(0.0f);
    const float weight = args.weights == nullptr ? 1.0f : args.weights[number];
    const float even = args.smoothing / static_cast<float>(args.size);
    Slopes slopes;
    Vec<T, N> cached[CACHED];
    Partial sums;
    float target;
    if constexpr (KNOWN) {
      const float log_sum = out.log_sums[number];
      slopes.shift = shift_of<T>(log_sum);
      slopes.of_softmax = weight * (1.0f + 2.0f * args.z_loss * log_sum) * correction<T>(log_sum);
      target = capped<T, CAP>(to_float(own), args.softcap);
      __syncthreads();  // every thread has read the target
    } else {
      sums = block_total(sums_of<T, CAP>(row, args, with_sum, cached, kept, out.slots), shared);
      if (out.write_grad && after < args.rows) prefetch<T>(args, after);
      // A label that is nowhere makes the loss NaN.
      target = here ? capped<T, CAP>(to_float(own), args.softcap)
                    : label >= 0 && label < args.size ? 0.0f : nanf("");
      const float log_total = logf(sums.total), log_sum = sums.most + log_total;
      if (threadIdx.x == 0 && split) {
        float* to = out.sums + number * out.numbers;
        to[0] = sums.most, to[1] = sums.total, to[2] = target;
        if (with_sum) to[3] = sums.plain;
      } else if (threadIdx.x == 0) {
        float loss = log_total + (sums.most - target);
        if (with_sum) loss += even * (static_cast<float>(args.size) * target - sums.plain);
        out.loss[number] = weight * (loss + args.z_loss * log_sum * log_sum);
      }
      slopes.shift = shift_of<T>(sums.most);
      slopes.of_softmax =
          weight * (1.0f + 2.0f * args.z_loss * log_sum) / sums.total * correction<T>(sums.most);
    }
    slopes.of_all = weight * even, slopes.of_label = weight * (1.0f - args.smoothing);
    if (KNOWN || out.write_grad) {
      float edge = 0.0f;
      if (row.edge >= 0) edge = to_float(row.logits[row.edge]);
      if constexpr (KNOWN) {
        write_grad<T, CAP>(row, slopes, args.softcap);
      } else {
        write_grad<T, CAP>(row, slopes, args.softcap, cached, kept, out.slots);
      }
      if (row.edge >= 0) row.logits[row.edge] = from_float<T>(gradient<T, CAP>(edge, slopes, args.softcap));
    }
    __syncthreads();  // the gradient of every logit is written, `shared` is read
    if ((KNOWN || out.write_grad) && here && threadIdx.x == 0) {
      // The label's own entry again, rounded once: probability - 1.
      float grad = power<T>(target, slopes.shift) * slopes.of_softmax - slopes.of_all - slopes.of_label;
      if (CAP) grad *= 1.0f - (target / args.softcap) * (target / args.softcap);
      row.logits[column] = from_float<T>(grad);
    }
  }
}

// Bytes of shared memory that a block may have beside what the kernel declares itself.
int shared_memory() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
  return std::max(0, bytes - 1024);
}

template <class T, bool CAP, bool KNOWN>
int launch(const CrossEntropy& args, Outputs out, Stream stream) {
  const auto kernel = cross_entropy_kernel<T, CAP, KNOWN>;
  const int64_t vectors = args.vocab / (16 / sizeof(T));
  // Registers are for 1024 threads of a multiprocessor. Two blocks, one of which reads while the other waits, where
  // both have their rows in shared memory.
  const bool keeps = !KNOWN && out.write_grad;
  const int threads = keeps && vectors > 8192 ? 1024 : vectors > 1024 ? 512 : 128;
  int bytes = 0;
  if (keeps && vectors > CACHED * threads) {
    out.slots = static_cast<int>(std::min<int64_t>(vectors - CACHED * threads, shared_memory() / 16));
    bytes = out.slots * 16;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  const int64_t together = static_cast<int64_t>(multiprocessors()) * (1024 / threads);
  kernel<<<static_cast<unsigned>(std::min(args.rows, together)), threads, bytes, stream>>>(args, out);
  return launched();
}

template <bool KNOWN>
int launch(const CrossEntropy& args, const Outputs& out, Stream stream) {
  if (args.rows == 0) return 0;
  return with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (args.softcap == 0.0f) return launch<T, false, KNOWN>(args, out, stream);
    return launch<T, true, KNOWN>(args, out, stream);
  });
}

}  // namespace

int cross_entropy(const CrossEntropy& args, bool write_grad, float* loss, Stream stream) {
  if (write_grad && args.rows > 0 && cluster_takes(args)) return cross_entropy_cluster(args, loss, stream);
  return launch<false>(args, {loss, nullptr, nullptr, 0, write_grad, 0}, stream);
}

int cross_entropy_sums(const CrossEntropy& args, bool with_sum, float* sums, Stream stream) {
  return launch<false>(args, {nullptr, sums, nullptr, with_sum ? 4 : 3, false, 0}, stream);
}

int cross_entropy_grad(const CrossEntropy& args, const float* log_sums, Stream stream) {
  return launch<true>(args, {nullptr, nullptr, log_sums, 0, true, 0}, stream);
}

}  // namespace megatune::cuda
