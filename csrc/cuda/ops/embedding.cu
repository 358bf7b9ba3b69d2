// Rows of a table that are looked up, and the gradient of the table: sums over equal ids, which are sorted for it. No
// atomics: each sum is made in an order that depends on the ids alone.
//
// The sorted rows are cut into pieces of CHUNK. A run of equal ids within one piece is summed and written at once. Of a
// run that crosses pieces each piece leaves its part in `partials` (its end in slot 1, where the run begins; slot 0 for
// the pieces after that), and another kernel adds these up. Rows that no id names, most of a large table, are cleared:
// a part of them beside each step, so that the memory is busy while the ids are sorted and where launches meet.

#undef NDEBUG  // an id of no row is to stop the device in every build
#include <cassert>

#include "../common/dependent.cuh"
#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "megatune/cuda_tokens.h"

namespace megatune::cuda {

namespace {

constexpr int THREADS = 128;
constexpr int CHUNK = 32;
constexpr int AT_ONCE = 8;  // loads of a thread that are under way together

// ---- rows

constexpr int LOOKUPS = 2;  // vectors of a thread

template <class T, int N>
__device__ inline Vec<T, N> zeros() {
  Vec<T, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result.at[i] = from_float<T>(0.0f);
  return result;
}

// Of memory that nobody writes meanwhile; each is read by one thread only.
template <int N, class T>
__device__ inline Vec<T, N> load_once(const T* from) {
  Vec<T, N> result;
  if constexpr (sizeof(result) == 16) {
    int4 words;
    asm("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
        : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
        : "l"(__cvta_generic_to_global(from)));
    memcpy(&result, &words, sizeof words);
  } else {
    result = load<N>(from);
  }
  return result;
}

// Blocks for parts of rows, those of a row after each other. W: vectors of 16 bytes or single elements. Loads and
// stores that keep nothing in the first level cache are a few hundredths slower where launches follow each other.
template <class W>
__global__ void __launch_bounds__(THREADS)
    rows_kernel(const EmbeddingRows args, int64_t stride, int64_t width, uint32_t parts) {
  wait_for_previous();
  let_next_begin();
  const uint32_t token = blockIdx.x / parts, part = blockIdx.x % parts;
  const int64_t id = args.ids[token], row = id - args.first;
  const bool is_there = row >= 0 && row < args.rows;
  const W* from = static_cast<const W*>(args.table) + row * stride;
  W* to = static_cast<W*>(args.y) + token * width;
  const int64_t first = static_cast<int64_t>(part) * THREADS * LOOKUPS + threadIdx.x;
  W values[LOOKUPS];
#pragma unroll
  for (int i = 0; i < LOOKUPS; ++i) {
    const int64_t column = first + i * THREADS;
    values[i] = is_there && column < width ? from[column] : W{};
  }
  assert(id >= 0 && id < args.total);
#pragma unroll
  for (int i = 0; i < LOOKUPS; ++i) {
    const int64_t column = first + i * THREADS;
    if (column < width) to[column] = values[i];
  }
}

// ---- rows of the gradient that no id names

// The row of the table's part; -1 where it is in another.
__device__ inline int32_t row_of(const EmbeddingBackward& args, int64_t token) {
  const int64_t row = args.ids[token] - args.first;
  return row >= 0 && row < args.rows ? static_cast<int32_t>(row) : -1;
}

__global__ void __launch_bounds__(2 * THREADS) name_kernel(const EmbeddingBackward args) {
  let_next_begin();
  const int64_t token = static_cast<int64_t>(blockIdx.x) * 2 * THREADS + threadIdx.x;
  const int32_t row = token < args.count ? row_of(args, token) : -1;
  if (row >= 0) args.named[row] = 1;
}

constexpr int STORES = 8;  // vectors of a thread

// What a launch does beside its own work: rows [first, end) are cleared by warps, each of which takes a part of a row.
struct Cleared {
  int64_t first, end;
  uint32_t parts;
  unsigned blocks(int threads) const {
    return static_cast<unsigned>(((end - first) * parts * 32 + threads - 1) / threads);
  }
};

template <class T, int N>
__device__ void clear(const EmbeddingBackward& args, const Cleared& rows, uint32_t block) {
  // Rows beyond 2^32 parts of a warp would fill terabytes.
  const uint32_t item = block * (blockDim.x / 32) + threadIdx.x / 32;
  const int64_t row = rows.first + item / rows.parts;
  // Past the first level cache: it was written by a launch that this one did not wait for.
  if (row >= rows.end || __ldcg(args.named + row) != 0) return;
  T* to = static_cast<T*>(args.grad_weight) + row * args.width;
  const int64_t first = (static_cast<int64_t>(item % rows.parts) * 32 * STORES + threadIdx.x % 32) * N;
#pragma unroll
  for (int i = 0; i < STORES; ++i) {
    const int64_t column = first + i * 32 * N;
    if (column < args.width) store_whole(to + column, zeros<T, N>());
  }
}

// ---- the order of ids: sorted pieces of SORTED keys, of each of which the other pieces tell its rank

constexpr int SORTED = 1024;
constexpr int SEARCHES = 4;  // in pieces at a time; more is slower
constexpr uint64_t NO_KEY = ~uint64_t{0};

template <class T, int N>
__global__ void __launch_bounds__(SORTED / 2) sort_kernel(const EmbeddingBackward args, unsigned sorts, Cleared rows) {
  __shared__ uint64_t keys[SORTED];
  wait_for_previous();
  let_next_begin();
  if (blockIdx.x >= sorts) return clear<T, N>(args, rows, blockIdx.x - sorts);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * SORTED;
  // A row (-1: the last) and its token: no two are equal.
  for (int i = threadIdx.x; i < SORTED; i += SORTED / 2)
    keys[i] = begin + i < args.count
                  ? static_cast<uint64_t>(static_cast<uint32_t>(row_of(args, begin + i))) << 32 | (begin + i)
                  : NO_KEY;
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

__device__ void rank(const EmbeddingBackward& args, int mine, int pieces) {
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
        if (first + i < pieces && args.keys[(first + i) * SORTED + low[i] + step - 1] < key) low[i] += step;
    }
#pragma unroll
    for (int i = 0; i < SEARCHES; ++i) {
      if (first + i >= pieces || first + i == mine / SORTED) continue;
      // The search ends before the last one.
      if (low[i] == SORTED - 1 && args.keys[(first + i) * SORTED + SORTED - 1] < key) ++low[i];
      rank += low[i];
    }
  }
  args.sorted[rank] = static_cast<int32_t>(key >> 32);
  args.tokens[rank] = static_cast<int32_t>(key);
}

// The sorted rows and their tokens, of sorted pieces or of the order that is given.
template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    order_kernel(const EmbeddingBackward args, unsigned ranks, int pieces, Cleared rows) {
  let_next_begin();
  if (blockIdx.x >= ranks) return clear<T, N>(args, rows, blockIdx.x - ranks);
  wait_for_previous();
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (args.order == nullptr) {
    rank(args, static_cast<int>(mine), pieces);
  } else if (mine < args.count) {
    const int64_t token = args.order[mine];
    args.sorted[mine] = row_of(args, token);
    args.tokens[mine] = static_cast<int32_t>(token);
  }
}

// ---- sums

// A piece, THREADS * N columns of it.
template <class T, int N>
__device__ void sum_piece(const EmbeddingBackward& args, int64_t piece, int64_t part) {
  __shared__ int32_t ids[CHUNK + 2];  // with the neighbours' of the piece
  __shared__ int64_t from[CHUNK];
  const int64_t begin = piece * CHUNK;
  const int whole = static_cast<int>(min(static_cast<int64_t>(CHUNK), args.count - begin));
  for (int i = threadIdx.x; i < whole + 2; i += THREADS) {
    const int64_t at = begin + i - 1;
    ids[i] = at >= 0 && at < args.count ? __ldcg(args.sorted + at) : -1;
    if (i < whole) from[i] = __ldcg(args.tokens + begin + i) * args.grad_stride;
  }
  __syncthreads();
  int count = whole;
  while (count > 0 && ids[count] < 0) --count;  // those of no row, which come last
  const int64_t column = (part * THREADS + threadIdx.x) * N;
  if (column >= args.width) return;
  const T* grad = static_cast<const T*>(args.grad) + column;
  Vec<float, N> sum = zeros<float, N>();
  bool is_first_run = true;
  for (int at = 0; at < count; at += AT_ONCE) {
    Vec<T, N> parts[AT_ONCE];
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j)
      if (at + j < count) parts[j] = load_once<N>(grad + from[at + j]);
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      const int next = at + j + 1;
      if (next > count) continue;
      const auto wide = widen(parts[j]);
#pragma unroll
      for (int k = 0; k < N; ++k) sum.at[k] += wide.at[k];
      const int32_t id = ids[next];
      if (next < count && ids[next + 1] == id) continue;  // so does the run
      if (is_first_run && ids[0] == id) {
        store(args.partials + piece * 2 * args.width + column, sum);
      } else if (next == whole && ids[whole + 1] == id) {
        store(args.partials + (piece * 2 + 1) * args.width + column, sum);
      } else {
        store_whole(static_cast<T*>(args.grad_weight) + id * args.width + column, narrow<T>(sum));
      }
      is_first_run = false;
      sum = zeros<float, N>();
    }
  }
}

// Rows are cleared first: while they are, the order comes.
template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    pieces_kernel(const EmbeddingBackward args, unsigned clears, uint32_t parts, Cleared rows) {
  if (blockIdx.x < clears) {
    let_next_begin();
    return clear<T, N>(args, rows, blockIdx.x);
  }
  wait_for_previous();
  let_next_begin();
  const uint32_t block = blockIdx.x - clears;
  sum_piece<T, N>(args, block / parts, block % parts);
}

// Runs that begin in this piece and end in a later one.
template <class T, int N>
__device__ void sum_crossing(const EmbeddingBackward& args, int64_t piece, int64_t part) {
  const int64_t begin = piece * CHUNK, end = begin + CHUNK;
  if (end >= args.count) return;
  const int32_t id = args.sorted[end - 1];
  if (args.sorted[end] != id || id < 0) return;
  if (begin > 0 && args.sorted[begin] == id && args.sorted[begin - 1] == id) return;  // it began before
  // The last piece that begins with it: known first, so that parts of many are under way together.
  int64_t last = piece + 1, beyond = (args.count + CHUNK - 1) / CHUNK;
  while (beyond - last > 1) {
    const int64_t middle = (last + beyond) / 2;
    (args.sorted[middle * CHUNK] == id ? last : beyond) = middle;
  }
  const int64_t column = (part * THREADS + threadIdx.x) * N;
  if (column >= args.width) return;
  auto sum = load<N>(args.partials + (piece * 2 + 1) * args.width + column);
#pragma unroll 4
  for (int64_t next = piece + 1; next <= last; ++next) {
    const auto one = load<N>(args.partials + next * 2 * args.width + column);
#pragma unroll
    for (int k = 0; k < N; ++k) sum.at[k] += one.at[k];
  }
  store_whole(static_cast<T*>(args.grad_weight) + id * args.width + column, narrow<T>(sum));
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    crossing_kernel(const EmbeddingBackward args, unsigned sums, uint32_t parts, Cleared rows) {
  if (blockIdx.x >= sums) return clear<T, N>(args, rows, blockIdx.x - sums);
  wait_for_previous();
  sum_crossing<T, N>(args, blockIdx.x / parts, blockIdx.x % parts);
}

}  // namespace

int embedding_rows(const EmbeddingRows& args, Stream stream) {
  if (args.count == 0 || args.width == 0) return 0;
  const int64_t size = args.type == Type::f32 ? 4 : 2, each = 16 / size;
  const auto look_up = [&](auto word, int64_t in_word) {
    const int64_t stride = args.stride / in_word, width = args.width / in_word;
    const int64_t parts = (width + THREADS * LOOKUPS - 1) / (THREADS * LOOKUPS);
    const auto blocks = static_cast<unsigned>(args.count * parts);
    return launch_early(rows_kernel<decltype(word)>, blocks, THREADS, 0, stream, args, stride, width,
                        static_cast<uint32_t>(parts));
  };
  if (args.width % each == 0 && args.stride % each == 0 && aligned({args.table, args.y})) return look_up(int4{}, each);
  return size == 4 ? look_up(uint32_t{}, 1) : look_up(uint16_t{}, 1);
}

int64_t embedding_order_keys(int64_t count) { return (count + SORTED - 1) / SORTED * SORTED; }

int64_t embedding_chunks(int64_t count) { return (count + CHUNK - 1) / CHUNK; }

namespace {

// The launches of a gradient, all but the first with a share of the rows to clear.
template <class T, int N>
int sums_of(const EmbeddingBackward& args, Stream stream) {
  const auto cut = [&](int64_t each) { return static_cast<uint32_t>((args.width + each - 1) / each); };
  const auto share = [&](int from, int to) {  // in hundredths
    return Cleared{args.rows * from / 100, args.rows * to / 100, cut(32 * STORES * N)};
  };
  const auto names = static_cast<unsigned>((args.count + 2 * THREADS - 1) / (2 * THREADS));
  name_kernel<<<names, 2 * THREADS, 0, stream>>>(args);
  if (const int error = launched()) return error;

  // At least one block: those of the next launch rely on its having waited for the names.
  const auto sorts = args.order ? 0u : static_cast<unsigned>(embedding_order_keys(args.count) / SORTED);
  const Cleared first = share(0, 20);
  const unsigned blocks = std::max(1u, sorts + first.blocks(SORTED / 2));
  if (const int error = launch_early(sort_kernel<T, N>, blocks, SORTED / 2, 0, stream, args, sorts, first)) return error;

  const auto ranks = static_cast<unsigned>((args.order ? args.count + THREADS - 1 : sorts * SORTED) / THREADS);
  const Cleared second = share(20, 40);
  if (const int error = launch_early(order_kernel<T, N>, ranks + second.blocks(THREADS), THREADS, 0, stream, args, ranks,
                                     static_cast<int>(sorts), second))
    return error;

  const uint32_t parts = cut(THREADS * N);
  const auto sums = static_cast<unsigned>(embedding_chunks(args.count) * parts);
  const Cleared third = share(40, 80);
  const unsigned clears = third.blocks(THREADS);
  if (const int error = launch_early(pieces_kernel<T, N>, clears + sums, THREADS, 0, stream, args, clears, parts, third))
    return error;

  const Cleared fourth = share(80, 100);
  return launch_early(crossing_kernel<T, N>, sums + fourth.blocks(THREADS), THREADS, 0, stream, args, sums, parts, fourth);
}

}  // namespace

int embedding_backward(const EmbeddingBackward& args, Stream stream) {
  if (args.rows == 0 || args.width == 0) return 0;
  if (args.count == 0)
    return static_cast<int>(cudaMemsetAsync(
        args.grad_weight, 0, args.rows * args.width * (args.type == Type::f32 ? 4 : 2), stream));
  if (args.order == nullptr && args.count > EMBEDDING_ORDER) return static_cast<int>(cudaErrorInvalidValue);
  if (const cudaError_t error = cudaMemsetAsync(args.named, 0, args.rows, stream)) return static_cast<int>(error);
  return with_type(args.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int N = 16 / sizeof(T);
    const bool vectors = args.width % N == 0 && args.grad_stride % N == 0 &&
                         aligned({args.grad, args.partials, args.grad_weight});
    return vectors ? sums_of<T, N>(args, stream) : sums_of<T, 1>(args, stream);
  });
}

}  // namespace megatune::cuda
