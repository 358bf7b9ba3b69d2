// Rows of a table that are looked up, and the gradient of the table: sums over equal ids, which come sorted. No
// atomics: each sum is made in an order that depends on the ids alone.
//
// The sorted rows are cut into pieces of CHUNK. A run of equal ids within one piece is summed and written at once. Of a
// run that crosses pieces each piece leaves its part in `partials` (its end in slot 1, where the run begins; slot 0 for
// the pieces after that), and another kernel adds these up. Rows that no id names are cleared.

#undef NDEBUG  // an id of no row is to stop the device in every build
#include <cassert>

#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "megatune/cuda_tokens.h"

namespace megatune::cuda {

namespace {

constexpr int THREADS = 128;
constexpr int CHUNK = 32;
constexpr int AT_ONCE = 4;  // loads of a thread that are under way together

// ---- rows

constexpr int LOOKUPS = 2;  // vectors of a thread

// Parts of a row are with blocks that follow each other.
template <class T, int N>
__global__ void __launch_bounds__(THREADS) rows_kernel(const EmbeddingRows args, uint32_t parts) {
  for (int64_t block = blockIdx.x; block < args.count * parts; block += gridDim.x) {
    const int64_t token = block / parts;
    const int64_t first = (block - token * parts) * THREADS * LOOKUPS + threadIdx.x;
    const int64_t id = args.ids[token];
    const bool is_there = id >= 0 && id < args.rows;
    // Another row where there is none: the loads do not wait for what comes of the comparison.
    const T* from = static_cast<const T*>(args.table) + (is_there ? id : 0) * args.stride;
    Vec<T, N> values[LOOKUPS];
#pragma unroll
    for (int i = 0; i < LOOKUPS; ++i) {
      const int64_t column = (first + i * THREADS) * N;
      if (column < args.width && args.rows > 0) values[i] = load<N>(from + column);
    }
    assert(is_there || (args.cut && id == -1));
#pragma unroll
    for (int i = 0; i < LOOKUPS; ++i) {
      const int64_t column = (first + i * THREADS) * N;
      if (column >= args.width) continue;
      if (!is_there) {
#pragma unroll
        for (int j = 0; j < N; ++j) values[i].at[j] = from_float<T>(0.0f);
      }
      store_whole(static_cast<T*>(args.y) + token * args.width + column, values[i]);
    }
  }
}

// ---- the order of ids: sorted pieces of SORTED keys, of each of which the other pieces tell its rank

constexpr int SORTED = 1024;
constexpr int SEARCHES = 4;  // in pieces at a time
constexpr uint64_t NO_KEY = ~uint64_t{0};

// An id, in the order of int32, and its token: no two are equal.
__device__ inline uint64_t key_of(int64_t id, int64_t token) {
  if (id < INT32_MIN || id > INT32_MAX) id = -1;
  const uint32_t rank = static_cast<uint32_t>(static_cast<int32_t>(id)) ^ 0x80000000u;
  return static_cast<uint64_t>(rank) << 32 | static_cast<uint32_t>(token);
}

__global__ void __launch_bounds__(SORTED / 2) sort_kernel(const EmbeddingOrder args) {
  __shared__ uint64_t keys[SORTED];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * SORTED;
  for (int i = threadIdx.x; i < SORTED; i += SORTED / 2)
    keys[i] = begin + i < args.count ? key_of(args.ids[begin + i], begin + i) : NO_KEY;
  __syncthreads();
  // Bitonic: runs of `size`, every other one falling.
  for (int size = 2; size <= SORTED; size *= 2) {
    for (int step = size / 2; step > 0; step /= 2) {
      const int low = 2 * threadIdx.x - (threadIdx.x & (step - 1));
      const uint64_t one = keys[low], two = keys[low + step];
      if ((one > two) == ((low & size) == 0)) keys[low] = two, keys[low + step] = one;
      __syncthreads();
    }
  }
  for (int i = threadIdx.x; i < SORTED; i += SORTED / 2) args.keys[begin + i] = keys[i];
}

__global__ void __launch_bounds__(THREADS) rank_kernel(const EmbeddingOrder args, int pieces) {
  const int mine = blockIdx.x * THREADS + threadIdx.x;
  const uint64_t key = args.keys[mine];
  if (key == NO_KEY) return;
  int rank = mine % SORTED;
  for (int first = 0; first < pieces; first += SEARCHES) {
    int low[SEARCHES];  // keys of the piece that are lower, so far
#pragma unroll
    for (int i = 0; i < SEARCHES; ++i) low[i] = 0;
#pragma unroll
    for (int step = SORTED / 2; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < SEARCHES; ++i)
        if (first + i < pieces && __ldg(args.keys + (first + i) * SORTED + low[i] + step - 1) < key) low[i] += step;
    }
#pragma unroll
    for (int i = 0; i < SEARCHES; ++i) {
      if (first + i >= pieces || first + i == mine / SORTED) continue;
      // The search ends before the last one.
      if (low[i] == SORTED - 1 && __ldg(args.keys + (first + i) * SORTED + SORTED - 1) < key) ++low[i];
      rank += low[i];
    }
  }
  args.sorted[rank] = static_cast<int32_t>(static_cast<uint32_t>(key >> 32) ^ 0x80000000u);
  args.order[rank] = static_cast<int64_t>(key & 0xffffffffu);
}

// ---- gradient

__device__ inline bool in_table(int32_t id, int64_t rows) { return id >= 0 && id < rows; }

// Blocks (piece, columns). Also notes which rows are named.
template <class T, int N>
__global__ void __launch_bounds__(THREADS) pieces_kernel(const EmbeddingBackward args) {
  __shared__ int32_t ids[CHUNK + 2];  // with the neighbours' of the piece
  __shared__ int64_t from[CHUNK];
  const int64_t piece = blockIdx.x, begin = piece * CHUNK;
  const int count = static_cast<int>(min(static_cast<int64_t>(CHUNK), args.count - begin));
  for (int i = threadIdx.x; i < count + 2; i += THREADS) {
    const int64_t at = begin + i - 1;
    ids[i] = at >= 0 && at < args.count ? args.ids[at] : -1;
    if (i < count) from[i] = args.order[begin + i] * args.grad_stride;
  }
  __syncthreads();
  if (blockIdx.y == 0)
    for (int i = threadIdx.x; i < count; i += THREADS)
      if (in_table(ids[i + 1], args.rows)) args.named[ids[i + 1]] = 1;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * THREADS + threadIdx.x) * N;
  if (column >= args.width) return;
  const T* grad = static_cast<const T*>(args.grad) + column;
  Vec<float, N> sum;
#pragma unroll
  for (int k = 0; k < N; ++k) sum.at[k] = 0.0f;
  bool is_first_run = true;
  for (int at = 0; at < count; at += AT_ONCE) {
    Vec<T, N> parts[AT_ONCE];
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j)
      if (at + j < count) parts[j] = load<N>(grad + from[at + j]);
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      const int next = at + j + 1;
      if (next > count) continue;
      const auto part = widen(parts[j]);
#pragma unroll
      for (int k = 0; k < N; ++k) sum.at[k] += part.at[k];
      const int32_t id = ids[next];
      if (next < count && ids[next + 1] == id) continue;  // so does the run
      if (in_table(id, args.rows)) {
        if (is_first_run && ids[0] == id) {
          store(args.partials + piece * 2 * args.width + column, sum);
        } else if (next == count && ids[count + 1] == id) {
          store(args.partials + (piece * 2 + 1) * args.width + column, sum);
        } else {
          store_whole(static_cast<T*>(args.grad_weight) + id * args.width + column, narrow<T>(sum));
        }
      }
      is_first_run = false;
#pragma unroll
      for (int k = 0; k < N; ++k) sum.at[k] = 0.0f;
    }
  }
}

// Runs that begin in this piece and end in a later one.
template <class T, int N>
__global__ void __launch_bounds__(THREADS) crossing_kernel(const EmbeddingBackward args) {
  const int64_t piece = blockIdx.x, begin = piece * CHUNK, end = begin + CHUNK;
  if (end >= args.count) return;
  const int32_t id = args.ids[end - 1];
  if (args.ids[end] != id || !in_table(id, args.rows)) return;
  if (begin > 0 && args.ids[begin] == id && args.ids[begin - 1] == id) return;  // it began before
  // The last piece that begins with it: known first, so that parts of many are under way together.
  int64_t last = piece + 1, beyond = (args.count + CHUNK - 1) / CHUNK;
  while (beyond - last > 1) {
    const int64_t middle = (last + beyond) / 2;
    (args.ids[middle * CHUNK] == id ? last : beyond) = middle;
  }
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * THREADS + threadIdx.x) * N;
  if (column >= args.width) return;
  auto sum = load<N>(args.partials + (piece * 2 + 1) * args.width + column);
#pragma unroll 4
  for (int64_t next = piece + 1; next <= last; ++next) {
    const auto part = load<N>(args.partials + next * 2 * args.width + column);
#pragma unroll
    for (int k = 0; k < N; ++k) sum.at[k] += part.at[k];
  }
  store_whole(static_cast<T*>(args.grad_weight) + id * args.width + column, narrow<T>(sum));
}

constexpr int CLEARED = 2;  // rows of a block

template <class T, int N>
__global__ void __launch_bounds__(2 * THREADS) clear_kernel(const EmbeddingBackward args) {
  Vec<T, N> zero;
#pragma unroll
  for (int k = 0; k < N; ++k) zero.at[k] = from_float<T>(0.0f);
#pragma unroll
  for (int i = 0; i < CLEARED; ++i) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * CLEARED + i;
    if (row >= args.rows || args.named[row] != 0) continue;
    T* to = static_cast<T*>(args.grad_weight) + row * args.width;
    for (int64_t column = threadIdx.x * N; column < args.width; column += 2 * THREADS * N)
      store_whole(to + column, zero);
  }
}

}  // namespace

int embedding_rows(const EmbeddingRows& args, Stream stream) {
  if (args.count == 0 || args.width == 0) return 0;
  with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    const bool vectors = args.width % N == 0 && args.stride % N == 0 && aligned({args.table, args.y});
    const int64_t each = (vectors ? N : 1) * THREADS * LOOKUPS;
    const unsigned parts = static_cast<unsigned>((args.width + each - 1) / each);
    const unsigned blocks = grid(args.count * parts, 1);
    if (vectors) {
      rows_kernel<T, N><<<blocks, THREADS, 0, stream>>>(args, parts);
    } else {
      rows_kernel<T, 1><<<blocks, THREADS, 0, stream>>>(args, parts);
    }
  });
  return launched();
}

int64_t embedding_order_keys(int64_t count) { return (count + SORTED - 1) / SORTED * SORTED; }

int embedding_order(const EmbeddingOrder& args, Stream stream) {
  if (args.count > EMBEDDING_ORDER) return static_cast<int>(cudaErrorInvalidValue);
  if (args.count == 0) return 0;
  const int keys = static_cast<int>(embedding_order_keys(args.count));
  sort_kernel<<<keys / SORTED, SORTED / 2, 0, stream>>>(args);
  rank_kernel<<<keys / THREADS, THREADS, 0, stream>>>(args, keys / SORTED);
  return launched();
}

int64_t embedding_chunks(int64_t count) { return (count + CHUNK - 1) / CHUNK; }

int embedding_backward(const EmbeddingBackward& args, Stream stream) {
  if (args.rows == 0 || args.width == 0) return 0;
  if (const cudaError_t error = cudaMemsetAsync(args.named, 0, args.rows, stream)) return static_cast<int>(error);
  with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    const bool vectors = args.width % N == 0 && args.grad_stride % N == 0 &&
                         aligned({args.grad, args.partials, args.grad_weight});
    const int64_t each = (vectors ? N : 1) * THREADS;
    const dim3 pieces(static_cast<unsigned>(embedding_chunks(args.count)),
                      static_cast<unsigned>((args.width + each - 1) / each));
    const unsigned rows = grid(args.rows, CLEARED);
    if (vectors) {
      if (args.count > 0) pieces_kernel<T, N><<<pieces, THREADS, 0, stream>>>(args);
      clear_kernel<T, N><<<rows, 2 * THREADS, 0, stream>>>(args);
      if (args.count > CHUNK) crossing_kernel<T, N><<<pieces, THREADS, 0, stream>>>(args);
    } else {
      if (args.count > 0) pieces_kernel<T, 1><<<pieces, THREADS, 0, stream>>>(args);
      clear_kernel<T, 1><<<rows, 2 * THREADS, 0, stream>>>(args);
      if (args.count > CHUNK) crossing_kernel<T, 1><<<pieces, THREADS, 0, stream>>>(args);
    }
  });
  return launched();
}

}  // namespace megatune::cuda
