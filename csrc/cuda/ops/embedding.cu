// Gradient of a table of which rows were looked up: sums over equal ids, which come sorted. No atomics: each sum is made in
// an order that depends on the ids alone.
//
// The sorted rows are cut into pieces of CHUNK. A run of equal ids within one piece is summed and written at once. Of a
// run that crosses pieces each piece leaves its part in `partials` (its end in slot 1, where the run begins; slot 0 for the
// pieces after that), and a second kernel adds these up.

#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "megatune/cuda_tokens.h"

namespace megatune::cuda {

namespace {

constexpr int THREADS = 128;
constexpr int CHUNK = 32;
constexpr int ROWS = 32;    // that a block clears
constexpr int AT_ONCE = 4;  // loads of a thread that are under way together

__device__ inline bool in_table(int32_t id, int64_t rows) { return id >= 0 && id < rows; }

template <class T, int N>
__device__ Vec<T, N> rounded(const Vec<float, N>& sum) {
  Vec<T, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result.at[i] = from_float<T>(sum.at[i]);
  return result;
}

// Rows from `first` on that no id names become 0: nothing else writes them.
template <class T, int N>
__device__ void clear_rows(const EmbeddingBackward& args, int64_t first, int64_t column) {
  __shared__ bool is_named[ROWS];
  for (int i = threadIdx.x; i < ROWS; i += THREADS) {
    const int64_t row = first + i;
    int64_t low = 0, high = args.count;  // the first id that is not below
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (args.ids[middle] < row) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    is_named[i] = row >= args.rows || (low < args.count && args.ids[low] == row);
  }
  __syncthreads();
  if (column >= args.width) return;
  Vec<T, N> zero;
#pragma unroll
  for (int i = 0; i < N; ++i) zero.at[i] = from_float<T>(0.0f);
#pragma unroll 8
  for (int i = 0; i < ROWS; ++i)
    if (!is_named[i]) store(static_cast<T*>(args.grad_weight) + (first + i) * args.width + column, zero);
}

// Blocks (piece, columns); behind the pieces, those that clear rows.
template <class T, int N>
__global__ void __launch_bounds__(THREADS) pieces_kernel(const EmbeddingBackward args) {
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * THREADS + threadIdx.x) * N;
  const int64_t piece = blockIdx.x, begin = piece * CHUNK, end = min(begin + CHUNK, args.count);
  if (begin >= args.count) {
    clear_rows<T, N>(args, (piece - (args.count + CHUNK - 1) / CHUNK) * ROWS, column);
    return;
  }
  if (column >= args.width) return;
  const bool continues = begin > 0 && args.ids[begin - 1] == args.ids[begin];
  bool is_first_run = true;
  for (int64_t at = begin; at < end;) {
    const int32_t id = args.ids[at];
    int64_t stop = at + 1;
    while (stop < end && args.ids[stop] == id) ++stop;
    if (in_table(id, args.rows)) {
      Vec<float, N> sum;
#pragma unroll
      for (int i = 0; i < N; ++i) sum.at[i] = 0.0f;
      const T* grad = static_cast<const T*>(args.grad) + column;
      for (int64_t row = at; row < stop; row += AT_ONCE) {
        Vec<T, N> parts[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j)
          if (row + j < stop) parts[j] = load<N>(grad + args.order[row + j] * args.grad_stride);
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
          if (row + j >= stop) continue;
#pragma unroll
          for (int i = 0; i < N; ++i) sum.at[i] += to_float(parts[j].at[i]);
        }
      }
      const bool goes_on = stop == end && end < args.count && args.ids[end] == id;
      if (is_first_run && continues) {
        store(args.partials + piece * 2 * args.width + column, sum);
      } else if (goes_on) {
        store(args.partials + (piece * 2 + 1) * args.width + column, sum);
      } else {
        store(static_cast<T*>(args.grad_weight) + id * args.width + column, rounded<T>(sum));
      }
    }
    is_first_run = false;
    at = stop;
  }
}

// Runs that begin in this piece and end in a later one.
template <class T, int N>
__global__ void __launch_bounds__(THREADS) crossing_kernel(const EmbeddingBackward args) {
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * THREADS + threadIdx.x) * N;
  if (column >= args.width) return;
  const int64_t piece = blockIdx.x, begin = piece * CHUNK, end = begin + CHUNK;
  if (end >= args.count) return;
  const int32_t id = args.ids[end - 1];
  if (args.ids[end] != id || !in_table(id, args.rows)) return;
  if (begin > 0 && args.ids[begin] == id && args.ids[begin - 1] == id) return;  // it began before
  auto sum = load<N>(args.partials + (piece * 2 + 1) * args.width + column);
#pragma unroll 4
  for (int64_t next = piece + 1; next * CHUNK < args.count; ++next) {
    if (args.ids[next * CHUNK] != id) break;
    const auto part = load<N>(args.partials + next * 2 * args.width + column);
#pragma unroll
    for (int i = 0; i < N; ++i) sum.at[i] += part.at[i];
  }
  store(static_cast<T*>(args.grad_weight) + id * args.width + column, rounded<T>(sum));
}

}  // namespace

int64_t embedding_chunks(int64_t count) { return (count + CHUNK - 1) / CHUNK; }

int embedding_backward(const EmbeddingBackward& args, Stream stream) {
  if (args.rows == 0 || args.width == 0) return 0;
  with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    const bool vectors = args.width % N == 0 && args.grad_stride % N == 0 &&
                         aligned({args.grad, args.partials, args.grad_weight});
    const int64_t step = vectors ? N : 1;
    const unsigned pieces = static_cast<unsigned>(embedding_chunks(args.count));
    const unsigned across = static_cast<unsigned>((args.width + step * THREADS - 1) / (step * THREADS));
    const dim3 blocks(pieces + static_cast<unsigned>((args.rows + ROWS - 1) / ROWS), across);
    if (vectors) {
      pieces_kernel<T, N><<<blocks, THREADS, 0, stream>>>(args);
      if (pieces > 1) crossing_kernel<T, N><<<dim3(pieces, across), THREADS, 0, stream>>>(args);
    } else {
      pieces_kernel<T, 1><<<blocks, THREADS, 0, stream>>>(args);
      if (pieces > 1) crossing_kernel<T, 1><<<dim3(pieces, across), THREADS, 0, stream>>>(args);
    }
  });
  return launched();
}

}  // namespace megatune::cuda
