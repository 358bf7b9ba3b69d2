// A norm to fp8 in blocks that reads each value once; for sm_90.
//
// A cluster of thread blocks, one on a multiprocessor, takes bands of 128 rows, each block a share of their tiles of
// 128 x 128 values, which pass through a ring in its shared memory. One warp fills the ring, as far ahead as there are
// free slots; four sum the squares of a band's rows as its tiles come, send the sums to all blocks of the cluster, add
// up what those have sent, and so know rstd; teams of eight quantise a tile each and give its slot back. None of these
// waits for the others to do the same, so that memory is busy while values are computed.
//
// A block sends a band's sums once it has added up those of the band before, for which it needed every other block's.
// So when those of a band come, all blocks have read those of two bands before, in whose place they are put.
#pragma once

#include <optional>

#include "../common/barrier.cuh"
#include "../common/dependent.cuh"
#include "fp8_tiles.cuh"

namespace megatune::cuda::fp8 {

struct RingPlan {
  static constexpr int TEAMS = 2, SUMMERS = 4;     // teams, warps
  static constexpr int SLOTS = 6, MOST_TILES = 4;  // MOST_TILES: of a band in a block, some of the next one besides
  static constexpr int MOST_BLOCKS = 16;           // of a cluster
  static constexpr int TURNS = SLOTS;              // bands of which there can be tiles in the ring
  static constexpr int WARPS_OF_TEAMS = TEAMS * WARPS;
  static constexpr int RING_THREADS = 32 * (WARPS_OF_TEAMS + SUMMERS + 1);
};

struct RingMemory {
  uint4 slots[RingPlan::SLOTS][TILE * LANES];
  uint4 peaks[RingPlan::TEAMS][WARPS * LANES];
  float inverses[RingPlan::TEAMS][TILE];
  float rstd[RingPlan::TURNS][TILE];
  float told[2][RingPlan::MOST_BLOCKS][TILE];  // sums of squares, of each block of the cluster
  uint64_t full[RingPlan::SLOTS], empty[RingPlan::SLOTS], known[RingPlan::TURNS];
  uint64_t all[2][RingPlan::SUMMERS];  // sums that one warp adds up have come
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

// A team of a thread block; barrier 0 is that of the whole one.
struct Team {
  int thread, barrier;
  __device__ void sync() const { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory"); }
};

// To the same place in the shared memory of the cluster's block `rank`, whose barrier counts the bytes.
__device__ inline void tell(float* to, uint64_t* barrier, uint32_t rank, float value) {
  asm volatile(
      "{\n.reg .b32 there, counter;\n"
      "mapa.shared::cluster.u32 there, %0, %2;\n"
      "mapa.shared::cluster.u32 counter, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], %3, [counter];\n}" ::"r"(address(to)),
      "r"(address(barrier)), "r"(rank), "f"(value)
      : "memory");
}

__device__ inline uint32_t rank_in_cluster() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline uint32_t blocks_of_cluster() {
  uint32_t blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}

// What all of a thread block know.
template <class Source>
struct Ring : RingPlan {
  using T = typename Source::Type;
  const Source& source;
  const Fp8& out;
  RingMemory& shared;
  uint32_t rank, blocks, clusters, first, across;
  uint32_t share, turns, tiles;  // of a band in this block; bands; of all bands

  __device__ Ring(const Source& source_, const Fp8& out_, RingMemory& shared_)
      : source(source_), out(out_), shared(shared_), rank(rank_in_cluster()), blocks(blocks_of_cluster()),
        clusters(gridDim.x / blocks), first(blockIdx.x / blocks), across(static_cast<uint32_t>(out.width / TILE)),
        share((across + blocks - 1) / blocks),
        turns((static_cast<uint32_t>(out.padded / TILE) - first + clusters - 1) / clusters), tiles(turns * share) {}

  // Of this block's tile n. Of a band's last ones some blocks have none: a strip beyond the matrix.
  __device__ uint32_t band_of(uint32_t n) const { return first + n / share * clusters; }
  __device__ uint32_t strip_of(uint32_t n) const { return n % share * blocks + rank; }

  __device__ void fill(int lane) const;
  __device__ void sum(int warp, int lane) const;
  __device__ void quantise(int which) const;
};

template <class Source>
__device__ void Ring<Source>::fill(int lane) const {
  const int64_t two_rows = 2 * source.row_stride;
  for (uint32_t n = 0; n < tiles; ++n) {
    uint64_t* full = shared.full + n % SLOTS;
    wait(shared.empty + n % SLOTS, n / SLOTS % 2 ^ 1);
    const uint32_t strip = strip_of(n);
    if (strip >= across) {
      arrive(full);
      continue;
    }
    const int64_t row = int64_t{band_of(n)} * TILE;
    const int rows = static_cast<int>(min(int64_t{TILE}, out.rows - row));
    const T* from = source.from(row + lane / LANES, int64_t{strip} * TILE + lane % LANES * N);
    uint32_t to = address(shared.slots[n % SLOTS] + lane);
    if (rows == TILE) {
#pragma unroll 8
      for (int i = 0; i < TILE; i += 2, to += 2 * LANES * 16, from += two_rows) copy_vector(to, from);
    } else {
      for (int i = lane / LANES; i < rows; i += 2, to += 2 * LANES * 16, from += two_rows) copy_vector(to, from);
    }
    arrive_with_copies(full);
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// Half a warp has 16 rows. Those behind the last one are of what was there before: nobody takes their sums.
template <class Source>
__device__ void Ring<Source>::sum(int warp, int lane) const {
  const int first_row = warp * 32 + lane / LANES * 16, at = lane % LANES, mine = warp * 32 + lane;
  for (uint32_t turn = 0, n = 0; turn < turns; ++turn) {
    float totals[2][N] = {};
#pragma unroll 1
    for (const uint32_t end = n + share; n < end; ++n) {
      wait(shared.full + n % SLOTS, n / SLOTS % 2);
      if (strip_of(n) >= across) continue;
      const uint4* from = shared.slots[n % SLOTS] + first_row * LANES + at;
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) totals[i / N][i % N] += sum_of_squares<T>(from[i * LANES]);
    }
    auto& told = shared.told[turn % 2];
    uint64_t* all = shared.all[turn % 2] + warp;
    if (lane == 0) expect(all, static_cast<int>(blocks * 32 * sizeof(float)));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Two lanes have a row's sum: each tells every other block.
      const float total = spread<LANES>(totals[half], at, Sum{});
      float* to = told[rank] + first_row + half * N + at / 2;
      for (uint32_t other = at % 2; other < blocks; other += 2) tell(to, all, other, total);
    }
    wait<true>(all, turn / 2 % 2);
    float total = 0.0f;  // all blocks add up in the same order
#pragma unroll 4
    for (uint32_t other = 0; other < blocks; ++other) total += told[other][mine];
    const float rstd = source.rstd_of(total, out.width);
    shared.rstd[turn % TURNS][mine] = rstd;
    arrive(shared.known + turn % TURNS);
    const int64_t row = int64_t{first + turn * clusters} * TILE + mine;
    if (rank == 0 && row < out.rows) source.rstd[row] = rstd;
  }
}

template <class Source>
__device__ void Ring<Source>::quantise(int which) const {
  const Team team{static_cast<int>(threadIdx.x) % THREADS, 1 + which};
  const int lane = team.thread % LANES, group = team.thread / LANES;
  for (uint32_t n = which; n < tiles; n += TEAMS) {
    const uint32_t band = band_of(n), strip = strip_of(n), turn = n / share;
    uint4* slot = shared.slots[n % SLOTS];
    wait(shared.full + n % SLOTS, n / SLOTS % 2);
    if (strip < across) {
      const int64_t row = int64_t{band} * TILE + group * N;
      const auto columns = source.columns(int64_t{strip} * TILE + lane * N);
      wait(shared.known + turn % TURNS, turn / TURNS % 2);
      typename Source::Rows rows;
      const float* rstd = shared.rstd[turn % TURNS] + group * N;
      const auto low = load<4>(rstd), high = load<4>(rstd + 4);
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
      quantise_tile<T>(block, out, band, strip, team, reinterpret_cast<uint2*>(slot), shared.inverses[which],
                       shared.peaks[which]);
    } else {
      wait(shared.known + turn % TURNS, turn / TURNS % 2);  // until when sums are waited for with this slot
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(shared.empty + n % SLOTS);
  }
}

#endif

template <class Source>
__global__ void __launch_bounds__(RingPlan::RING_THREADS, 1) norm_ring_kernel(const Source source, const Fp8 out) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint4 ring_memory[];
  RingMemory& shared = *reinterpret_cast<RingMemory*>(ring_memory);
  using P = RingPlan;
  const Ring<Source> ring(source, out, shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < P::SLOTS; ++i) prepare(shared.full + i, 32), prepare(shared.empty + i, WARPS);
    for (int i = 0; i < P::TURNS; ++i) prepare(shared.known + i, 32 * P::SUMMERS);
    for (int i = 0; i < 2 * P::SUMMERS; ++i) prepare(shared.all[0] + i, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  // No block leaves before all sums that are sent to it have come.
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  let_next_begin();
  wait_for_previous();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - P::WARPS_OF_TEAMS;
  if (warp < 0) {
    ring.quantise(threadIdx.x / THREADS);
  } else if (warp < P::SUMMERS) {
    ring.sum(warp, lane);
  } else {
    ring.fill(lane);
  }
#endif
}

// Nothing where the ring is not worth its start, has no room for a band, or the device too little for clusters. The
// larger they are, the further ahead of a band the ring is; more multiprocessors are left over.
template <class Source>
std::optional<int> launch_norm_ring(const Source& source, const Fp8& out, Stream stream) {
  using P = RingPlan;
  const int64_t across = out.width / TILE, bands = out.padded / TILE;
  if (out.codes == nullptr || out.codes_t == nullptr || across * bands < 2 * multiprocessors()) return {};
  const auto kernel = norm_ring_kernel<Source>;
  cudaFuncAttributes found;  // code that was made from PTX for sm_80 is empty
  if (const auto error = cudaFuncGetAttributes(&found, kernel)) return static_cast<int>(error);
  if (found.ptxVersion < 90) return {};
  constexpr int bytes = sizeof(RingMemory);
  auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return static_cast<int>(error);
  unsigned blocks = 1;
  while (blocks < P::MOST_BLOCKS && blocks < across) blocks *= 2;
  for (; blocks * P::MOST_TILES >= across; blocks /= 2) {
    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {blocks, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks), config.blockDim = dim3(P::RING_THREADS);
    config.dynamicSmemBytes = bytes, config.stream = stream;
    config.attrs = attributes, config.numAttrs = 1;
    int clusters = 0;  // that run at the same time
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
      cudaGetLastError();  // a device without room for clusters of that size may say so by an error
      continue;
    }
    if (static_cast<int>(4 * blocks) * clusters < 3 * multiprocessors()) continue;
    config.gridDim.x *= static_cast<unsigned>(std::min<int64_t>(bands, clusters));
    config.numAttrs = 2;
    return static_cast<int>(cudaLaunchKernelEx(&config, kernel, source, out));
  }
  return {};
}

}  // namespace megatune::cuda::fp8
