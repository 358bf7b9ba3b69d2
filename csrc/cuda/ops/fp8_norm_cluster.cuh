// A norm to fp8 in blocks that reads each value once, of rows that a cluster has room for; for sm_90.
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

#include "fp8_norm_ring.cuh"

namespace megatune::cuda::fp8 {

struct ClusterPlan {
  static constexpr int TEAMS = 2, SUMMERS = 4;  // teams, warps
  static constexpr int MOST_BLOCKS = 16;        // of a cluster
  // MOST_TILES: of a band in a block, so that two bands more are on their way. TURNS: bands with tiles in the ring.
  static constexpr int SLOTS = 6, MOST_TILES = 2, TURNS = SLOTS;
  static constexpr int WARPS_OF_TEAMS = TEAMS * WARPS;
  static constexpr int CLUSTER_THREADS = 32 * (WARPS_OF_TEAMS + SUMMERS + 1);
};

struct ClusterMemory {
  uint4 slots[ClusterPlan::SLOTS][TILE * LANES];
  uint4 peaks[ClusterPlan::TEAMS][WARPS * LANES];
  float inverses[ClusterPlan::TEAMS][TILE];
  float rstd[ClusterPlan::TURNS][TILE];
  float told[2][ClusterPlan::MOST_BLOCKS][TILE];  // sums of squares, of each block of the cluster
  uint64_t full[ClusterPlan::SLOTS], empty[ClusterPlan::SLOTS], known[ClusterPlan::TURNS];
  uint64_t all[2][ClusterPlan::SUMMERS];  // sums that one warp adds up have come
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

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
struct ClusterRing : ClusterPlan {
  using T = typename Source::Type;
  const Source& source;
  const Fp8& out;
  ClusterMemory& shared;
  uint32_t rank, blocks, clusters, first, across;
  uint32_t share, turns, tiles;  // of a band in this block; bands; of all bands

  __device__ ClusterRing(const Source& source_, const Fp8& out_, ClusterMemory& shared_)
      : source(source_), out(out_), shared(shared_), rank(rank_in_cluster()), blocks(blocks_of_cluster()),
        clusters(gridDim.x / blocks), first(blockIdx.x / blocks), across(static_cast<uint32_t>(out.width / TILE)),
        share((across + blocks - 1) / blocks),
        turns((static_cast<uint32_t>(out.padded / TILE) - first + clusters - 1) / clusters), tiles(turns * share) {}

  // Of this block's tile n. Of a band's last ones some blocks have none: a strip beyond the matrix.
  __device__ uint32_t turn_of(uint32_t n) const { return n >> (share - 1); }  // the share is 1 or 2
  __device__ uint32_t band_of(uint32_t n) const { return first + turn_of(n) * clusters; }
  __device__ uint32_t strip_of(uint32_t n) const { return (n & (share - 1)) * blocks + rank; }

  __device__ void fill(int lane) const;
  __device__ void sum(int warp, int lane) const;
  __device__ void quantise(int which) const;
};

template <class Source>
__device__ void ClusterRing<Source>::fill(int lane) const {
  for (uint32_t n = 0; n < tiles; ++n) {
    uint64_t* full = shared.full + n % SLOTS;
    wait(shared.empty + n % SLOTS, n / SLOTS % 2 ^ 1);
    const uint32_t strip = strip_of(n);
    if (strip >= across) {
      arrive(full);
      continue;
    }
    fetch_tile(source, out, int64_t{band_of(n)} * TILE, int64_t{strip} * TILE, lane, shared.slots[n % SLOTS], full);
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}

template <class Source>
__device__ void ClusterRing<Source>::sum(int warp, int lane) const {
  const int first_row = warp * 32 + lane / LANES * 16, at = lane % LANES, mine = warp * 32 + lane;
  for (uint32_t turn = 0, n = 0; turn < turns; ++turn) {
    float totals[2][N] = {};
#pragma unroll 1
    for (const uint32_t end = n + share; n < end; ++n) {
      wait(shared.full + n % SLOTS, n / SLOTS % 2);
      if (strip_of(n) >= across) continue;
      add_squares<T>(shared.slots[n % SLOTS], first_row, at, totals);
    }
    auto& told = shared.told[turn % 2];
    uint64_t* all = shared.all[turn % 2] + warp;
    if (lane == 0) expect(all, static_cast<int>(blocks * 32 * sizeof(float)));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Two lanes have a row's sum: each tells every other block.
      const float total = spread<LANES>(totals[half], at, Sum{});
      float* to = told[rank] + first_row + half * N + at / 2;
#pragma unroll 4
      for (uint32_t two = 0; two < MOST_BLOCKS; two += 2)
        if (two + at % 2 < blocks) tell(to, all, two + at % 2, total);
    }
    wait<true>(all, turn / 2 % 2);
    float total = 0.0f;  // all blocks add up in the same order
#pragma unroll
    for (uint32_t other = 0; other < MOST_BLOCKS; ++other) total += other < blocks ? told[other][mine] : 0.0f;
    const float rstd = source.rstd_of(total, out.width);
    shared.rstd[turn % TURNS][mine] = rstd;
    arrive(shared.known + turn % TURNS);
    const int64_t row = int64_t{first + turn * clusters} * TILE + mine;
    if (rank == 0 && row < out.rows) source.rstd[row] = rstd;
  }
}

template <class Source>
__device__ void ClusterRing<Source>::quantise(int which) const {
  const Team team{static_cast<int>(threadIdx.x) % THREADS, 1 + which};
  for (uint32_t n = which; n < tiles; n += TEAMS) {
    const uint32_t band = band_of(n), strip = strip_of(n), turn = turn_of(n);
    wait(shared.full + n % SLOTS, n / SLOTS % 2);
    if (strip < across) {
      const auto columns = source.columns(int64_t{strip} * TILE + team.thread % LANES * N);
      wait(shared.known + turn % TURNS, turn / TURNS % 2);
      quantise_slot(source, columns, out, band, strip, team, shared.slots[n % SLOTS], shared.rstd[turn % TURNS],
                    shared.inverses[which], shared.peaks[which]);
    } else {
      wait(shared.known + turn % TURNS, turn / TURNS % 2);  // until when sums are waited for with this slot
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(shared.empty + n % SLOTS);
  }
}

#endif

template <class Source>
__global__ void __launch_bounds__(ClusterPlan::CLUSTER_THREADS, 1)
    norm_cluster_kernel(const Source source, const Fp8 out) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint4 ring_memory[];
  ClusterMemory& shared = *reinterpret_cast<ClusterMemory*>(ring_memory);
  using P = ClusterPlan;
  const ClusterRing<Source> ring(source, out, shared);
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

// A launch for rows that clusters have room for.
template <class Source>
struct ClusterLaunch {
  using P = ClusterPlan;
  const Fp8& out;
  unsigned blocks = 1;
  int clusters = 0;  // that run at the same time; 0: the kernel is not worth its start, or the device has no room
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};

  explicit ClusterLaunch(const Fp8& out_) : out(out_) {
    const auto kernel = norm_cluster_kernel<Source>;
    const int64_t across = out.width / TILE, tiles = across * (out.padded / TILE);
    if (out.codes == nullptr || out.codes_t == nullptr || out.rows == 0) return;
    if (tiles < 2 * multiprocessors() || across > P::MOST_BLOCKS * P::MOST_TILES) return;
    cudaFuncAttributes found;  // code that was made from PTX for sm_80 is empty
    if (cudaFuncGetAttributes(&found, kernel) != cudaSuccess || found.ptxVersion < 90) return;
    while (blocks < P::MOST_BLOCKS && blocks < across) blocks *= 2;
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {blocks, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    constexpr int bytes = sizeof(ClusterMemory);
    config.gridDim = dim3(blocks), config.blockDim = dim3(P::CLUSTER_THREADS), config.dynamicSmemBytes = bytes;
    config.attrs = attributes, config.numAttrs = 1;
    auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error != cudaSuccess) cudaGetLastError(), clusters = 0;  // so some devices say that they have no room
    // Too much of the device would be idle.
    if (static_cast<int>(4 * blocks) * clusters < 3 * multiprocessors()) clusters = 0;
  }

  int launch(const Source& source, Stream stream) {
    config.gridDim.x *= static_cast<unsigned>(std::min<int64_t>(out.padded / TILE, clusters));
    config.stream = stream, config.numAttrs = 2;
    return static_cast<int>(cudaLaunchKernelEx(&config, norm_cluster_kernel<Source>, source, out));
  }
};

}  // namespace megatune::cuda::fp8
