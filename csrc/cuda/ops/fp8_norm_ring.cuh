// A norm to fp8 in blocks that reads each value once, of rows that are too long for fp8_norm_cluster.cuh; for sm_90.
//
// A multiprocessor has a thread block, with a ring of tiles of 128 x 128 values in shared memory. One warp fills it, a
// pair of neighbouring tiles at a time, as far ahead as there are free slots; four sum the squares of what has come
// and leave those of the pair's 128 rows in global memory; two collect there what all pairs of the same rows have left,
// and so know rstd; teams of eight quantise a tile each and give its slot back. None of these waits for the others to
// do the same, so that memory is busy while values are computed.
//
// A counter hands pairs out, in the order of rows, to blocks that have two free slots: what is handed out is summed,
// whatever else waits. So a block never waits for one that does not run, and not all need to run at once; those that
// do must have room for the pairs of the same rows.
#pragma once

#include "../common/barrier.cuh"
#include "../common/dependent.cuh"
#include "fp8_tiles.cuh"

namespace megatune::cuda::fp8 {

// In one workspace, whose bits are all ones before: sums that are not there yet, for arithmetic makes no such NaN, and a
// counter that is 0 once it is raised.
struct RingSums {
  static constexpr uint32_t NONE = 0xffffffffu;
  uint32_t* taken;
  float* squares;  // [pair, TILE]

  static constexpr int64_t AHEAD = 128;  // bytes of the counter, padding included
  __host__ static int64_t bytes(const Fp8& out) { return AHEAD + pairs_of(out) * TILE * sizeof(float); }
  __host__ __device__ static int64_t pairs_of(const Fp8& out) { return pairs_across(out) * (out.padded / TILE); }
  __host__ __device__ static int64_t pairs_across(const Fp8& out) { return (out.width / TILE + 1) / 2; }
};

struct RingPlan {
  static constexpr int TEAMS = 2, SUMMERS = 4, COLLECTORS = 2;  // teams, warps
  static constexpr int SLOTS = 6, TURNS = 4;                    // TURNS: pairs that are in use at a time, at most
  static constexpr int WARPS_OF_TEAMS = TEAMS * WARPS;
  static constexpr int RING_THREADS = 32 * (WARPS_OF_TEAMS + SUMMERS + COLLECTORS + 1);
};

struct RingMemory {
  uint4 slots[RingPlan::SLOTS][TILE * LANES];
  uint4 peaks[RingPlan::TEAMS][WARPS * LANES];
  float inverses[RingPlan::TEAMS][TILE];
  float rstd[RingPlan::TURNS][TILE];
  uint32_t pair[RingPlan::TURNS];
  uint64_t full[RingPlan::SLOTS], empty[RingPlan::SLOTS], known[RingPlan::TURNS];
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// Once this thread's copies have come.
__device__ inline void arrive_with_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(address(barrier)) : "memory");
}

__device__ inline void copy_vector(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

struct Sum {
  __device__ float operator()(float left, float right) const { return left + right; }
};

template <class T>
__device__ float sum_of_squares(const uint4& values) {
  const uint32_t words[4] = {values.x, values.y, values.z, values.w};
  float low = 0.0f, high = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = Pair<T>::wide(words[i]);
    low = fmaf(two.x, two.x, low), high = fmaf(two.y, two.y, high);
  }
  return low + high;
}

// A warp asks for a tile of a matrix that begins at a row and a column; `full` counts what comes. Rows behind the last
// one are left as they are.
template <class Source>
__device__ void fetch_tile(const Source& source, const Fp8& out, int64_t row, int64_t column, int lane, uint4* slot,
                           uint64_t* full) {
  const int64_t two_rows = 2 * source.row_stride;
  const int rows = static_cast<int>(min(int64_t{TILE}, out.rows - row));
  const auto* from = source.from(row + lane / LANES, column + lane % LANES * N);
  uint32_t to = address(slot + lane);
  if (rows == TILE) {
#pragma unroll 8
    for (int i = 0; i < TILE; i += 2, to += 2 * LANES * 16, from += two_rows) copy_vector(to, from);
  } else {
    for (int i = lane / LANES; i < rows; i += 2, to += 2 * LANES * 16, from += two_rows) copy_vector(to, from);
  }
  arrive_with_copies(full);
}

// A warp adds the squares of 32 of a tile's rows, 16 for each half of it, to what the lanes have. Those behind the last
// row are of what was there before: nobody takes their sums.
template <class T>
__device__ void add_squares(const uint4* slot, int first, int lane, float (&totals)[2][N]) {
  const uint4* from = slot + first * LANES + lane;
#pragma unroll
  for (int i = 0; i < 2 * N; ++i) totals[i / N][i % N] += sum_of_squares<T>(from[i * LANES]);
}

// A team of a thread block; barrier 0 is that of the whole one.
struct Team {
  int thread, barrier;
  __device__ void sync() const { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory"); }
};

// A tile in shared memory, of whose rows rstd is known, to both copies.
template <class Source, class Columns>
__device__ void quantise_slot(const Source& source, const Columns& columns, const Fp8& out, uint32_t band,
                              uint32_t strip, const Team& team, uint4* slot, const float* rstd, float* inverses,
                              uint4* peaks) {
  const int lane = team.thread % LANES, group = team.thread / LANES;
  const int64_t row = int64_t{band} * TILE + group * N;
  typename Source::Rows rows;
  const auto low = load<4>(rstd + group * N), high = load<4>(rstd + group * N + 4);
#pragma unroll
  for (int i = 0; i < 4; ++i) rows.rstd[i] = low.at[i], rows.rstd[i + 4] = high.at[i];
  Block block;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const uint4 piece[1] = {slot[(group * N + i) * LANES + lane]};
    source.finish(piece, rows, i, columns, block.at[i]);
  }
  blank(block, out.rows - row);
  // The tile itself is in registers once the team has met for the first time: transposed codes take its place.
  quantise_tile<typename Source::Type>(block, out, band, strip, team, reinterpret_cast<uint2*>(slot), inverses, peaks);
}

// What all of a thread block know.
template <class Source>
struct Ring : RingPlan {
  using T = typename Source::Type;
  const Source& source;
  const Fp8& out;
  const RingSums& sums;
  RingMemory& shared;
  uint32_t across, pairs_across, pairs;

  __device__ Ring(const Source& source_, const Fp8& out_, const RingSums& sums_, RingMemory& shared_)
      : source(source_), out(out_), sums(sums_), shared(shared_),
        across(static_cast<uint32_t>(out.width / TILE)), pairs_across((across + 1) / 2),
        pairs(pairs_across * static_cast<uint32_t>(out.padded / TILE)) {}

  // Tile n of this block, once it is there; of which pair it is, or none: a number beyond them.
  __device__ uint32_t pair_of(uint32_t n) const {
    wait(shared.full + n % SLOTS, n / SLOTS % 2);
    return *const_cast<volatile uint32_t*>(shared.pair + n / 2 % TURNS);
  }
  __device__ uint32_t strip_of(uint32_t pair, uint32_t n) const { return pair % pairs_across * 2 + n % 2; }

  __device__ void fill(int lane) const;
  __device__ void sum(int warp, int lane) const;
  __device__ void collect(int warp, int lane) const;
  __device__ void quantise(int which) const;
};

template <class Source>
__device__ void Ring<Source>::fill(int lane) const {
  // Two pairs that are none, so that each team comes to the end.
  for (uint32_t n = 0, ends = 0; ends < 2; n += 2) {
    for (uint32_t at = n; at < n + 2; ++at) wait(shared.empty + at % SLOTS, at / SLOTS % 2 ^ 1);
    uint32_t pair = pairs;
    if (ends == 0) {
      if (lane == 0) pair = atomicAdd(sums.taken, 1u) + 1;
      pair = __shfl_sync(0xffffffffu, pair, 0);
    }
    if (pair >= pairs) ++ends;
    if (lane == 0) *const_cast<volatile uint32_t*>(shared.pair + n / 2 % TURNS) = pair;
    const int64_t row = int64_t{pair / pairs_across} * TILE;
    for (uint32_t at = n; at < n + 2; ++at) {
      uint64_t* full = shared.full + at % SLOTS;
      if (lane == 0) arrive(full);  // what lane 0 wrote; all arrive once more, with what they copied
      const uint32_t strip = strip_of(pair, at);
      if (pair >= pairs || strip >= across) {
        arrive(full);
        continue;
      }
      fetch_tile(source, out, row, int64_t{strip} * TILE, lane, shared.slots[at % SLOTS], full);
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}

template <class Source>
__device__ void Ring<Source>::sum(int warp, int lane) const {
  const int first = warp * 32 + lane / LANES * 16, at = lane % LANES;
  for (uint32_t n = 0;; n += 2) {
    const uint32_t pair = pair_of(n);
    if (pair >= pairs) return;
    float totals[2][N] = {};
#pragma unroll 1
    for (uint32_t tile = n; tile < n + 2; ++tile) {
      wait(shared.full + tile % SLOTS, tile / SLOTS % 2);
      if (strip_of(pair, tile) >= across) break;
      add_squares<T>(shared.slots[tile % SLOTS], first, at, totals);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = spread<LANES>(totals[half], at, Sum{});
      float* to = sums.squares + int64_t{pair} * TILE + first + half * N + at / 2;
      if (at % 2 == 0) asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(to), "f"(total) : "memory");
    }
  }
}

// Two rows a lane. All blocks add up in the same order.
template <class Source>
__device__ void Ring<Source>::collect(int warp, int lane) const {
  constexpr uint32_t AT_ONCE = 8;
  const int first = warp * 64 + lane * 2;
  for (uint32_t n = 0;; n += 2) {
    const uint32_t pair = pair_of(n), band = pair / pairs_across;
    if (pair >= pairs) return;
    // Two sums a load, which is not cached.
    auto from = reinterpret_cast<const volatile uint64_t*>(sums.squares + int64_t{band} * pairs_across * TILE + first);
    float2 total{0.0f, 0.0f};
    for (uint32_t left = pairs_across;; left -= AT_ONCE, from += AT_ONCE * TILE / 2) {
      uint64_t found[AT_ONCE];
      bool all;
      do {
        all = true;
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; ++i) {
          found[i] = i < left ? from[i * TILE / 2] : 0;
          all = all && static_cast<uint32_t>(found[i]) != RingSums::NONE && found[i] >> 32 != RingSums::NONE;
        }
      } while (!all);
#pragma unroll
      for (uint32_t i = 0; i < AT_ONCE; ++i) {
        total.x += __uint_as_float(static_cast<uint32_t>(found[i]));
        total.y += __uint_as_float(static_cast<uint32_t>(found[i] >> 32));
      }
      if (left <= AT_ONCE) break;
    }
    const float2 rstd{source.rstd_of(total.x, out.width), source.rstd_of(total.y, out.width)};
    *reinterpret_cast<float2*>(shared.rstd[n / 2 % TURNS] + first) = rstd;
    arrive(shared.known + n / 2 % TURNS);
    if (pair % pairs_across == 0) {
      const int64_t row = int64_t{band} * TILE + first;
      if (row < out.rows) source.rstd[row] = rstd.x;
      if (row + 1 < out.rows) source.rstd[row + 1] = rstd.y;
    }
  }
}

template <class Source>
__device__ void Ring<Source>::quantise(int which) const {
  const Team team{static_cast<int>(threadIdx.x) % THREADS, 1 + which};
  for (uint32_t n = which;; n += TEAMS) {
    const uint32_t pair = pair_of(n);
    if (pair >= pairs) return;
    const uint32_t band = pair / pairs_across, strip = strip_of(pair, n), turn = n / 2 % TURNS;
    if (strip < across) {
      const auto columns = source.columns(int64_t{strip} * TILE + team.thread % LANES * N);
      wait(shared.known + turn, n / 2 / TURNS % 2);
      quantise_slot(source, columns, out, band, strip, team, shared.slots[n % SLOTS], shared.rstd[turn],
                    shared.inverses[which], shared.peaks[which]);
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(shared.empty + n % SLOTS);
  }
}

#endif

template <class Source>
__global__ void __launch_bounds__(RingPlan::RING_THREADS, 1)
    norm_ring_kernel(const Source source, const Fp8 out, const RingSums sums) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint4 ring_memory[];
  RingMemory& shared = *reinterpret_cast<RingMemory*>(ring_memory);
  using P = RingPlan;
  const Ring<Source> ring(source, out, sums, shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < P::SLOTS; ++i) prepare(shared.full + i, 33), prepare(shared.empty + i, WARPS);
    for (int i = 0; i < P::TURNS; ++i) prepare(shared.known + i, 32 * P::COLLECTORS);
  }
  __syncthreads();
  wait_for_previous();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - P::WARPS_OF_TEAMS;
  if (warp < 0) {
    ring.quantise(threadIdx.x / THREADS);
  } else if (warp < P::SUMMERS) {
    ring.sum(warp, lane);
  } else if (warp < P::SUMMERS + P::COLLECTORS) {
    ring.collect(warp - P::SUMMERS, lane);
  } else {
    ring.fill(lane);
  }
#endif
}

__global__ void clear_sums_kernel(uint4* workspace, int64_t count) {
  let_next_begin();
  wait_for_previous();
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at < count) workspace[at] = uint4{RingSums::NONE, RingSums::NONE, RingSums::NONE, RingSums::NONE};
}

// Whether the ring is worth its start, and enough blocks run at once for it to go round.
template <class Source>
bool ring_takes(const Fp8& out) {
  if (out.codes == nullptr || out.codes_t == nullptr || out.rows == 0) return false;
  const int blocks = multiprocessors();
  if (RingSums::pairs_of(out) < blocks || RingSums::pairs_across(out) > blocks) return false;
  cudaFuncAttributes found;  // code that was made from PTX for sm_80 is empty
  return cudaFuncGetAttributes(&found, norm_ring_kernel<Source>) == cudaSuccess && found.ptxVersion >= 90;
}

template <class Source>
int launch_norm_ring(const Source& source, const Fp8& out, void* workspace, Stream stream) {
  const auto kernel = norm_ring_kernel<Source>;
  constexpr int bytes = sizeof(RingMemory);
  if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
    return static_cast<int>(error);
  // Both the counter and the sums of 128 rows are vectors of 16 bytes.
  const int64_t vectors = RingSums::bytes(out) / 16;
  auto* words = static_cast<uint4*>(workspace);
  const auto cleared = launch_early(clear_sums_kernel, grid(vectors, THREADS), THREADS, 0, stream, words, vectors);
  if (cleared) return cleared;
  auto* taken = static_cast<uint32_t*>(workspace);
  const RingSums sums{taken, reinterpret_cast<float*>(static_cast<char*>(workspace) + RingSums::AHEAD)};
  return launch_early(kernel, multiprocessors(), RingPlan::RING_THREADS, bytes, stream, source, out, sums);
}

}  // namespace megatune::cuda::fp8
