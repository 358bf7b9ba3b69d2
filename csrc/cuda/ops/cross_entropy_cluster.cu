// Cross-entropy of rows of 16 bits and its gradient in their place, as a pipeline over rows; for sm_90.
//
// A multiprocessor has a block, and a cluster of blocks a row, each of them a share. In a block one thread copies shares
// into a ring of slots in shared memory, as far ahead as slots are free; half of the warps sum what has arrived and send
// their sums to every block of the cluster; the other half, once all sums of a row are there, write the gradient and
// give the slots back. So each logit is read once and written once, and neither side of the memory waits for the other.

#include "cross_entropy_cluster.cuh"

#include "../common/barrier.cuh"
#include "../common/launch.cuh"
#include "../common/vec.cuh"

namespace megatune::cuda {

namespace {

constexpr int WARP = 32;
constexpr int WARPS = 8;  // for sums, and as many for the gradient
constexpr int EACH = 2;   // vectors of a slot for each thread of a side
constexpr int SIDE = WARPS * WARP;
constexpr int SLOT = SIDE * EACH;  // vectors of 16 bytes
constexpr int MOST_SLOTS = 28;     // as many as a multiprocessor has room for
constexpr int MOST_BLOCKS = 4;     // of a cluster
constexpr int LEAST_VOCAB = 16384;  // shorter rows are not worth a ring
// Rows whose sums are kept. The ring holds at most half as many: sums of a row can be sent only when all blocks have
// begun the gradient of the row that many before it, and so have read all sums that were in its place.
constexpr int TURNS = 16;
constexpr int OWN_SHARED = 5120;  // more than Shared takes

struct Plan {
  int blocks;  // of a cluster
  int share;   // vectors of a row for each block; the last one may have fewer
  int parts;   // slots that a share takes
  int slots;   // of the ring
};

struct Shared {
  uint64_t full[MOST_SLOTS], empty[MOST_SLOTS], ready[TURNS];
  float2 sums[TURNS][MOST_BLOCKS * WARPS];  // of each warp: shift, sum of 2^(logit * LOG2_E - shift)
};
static_assert(sizeof(Shared) <= OWN_SHARED);

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
constexpr float LOWEST = -1e30f;  // below all logits but -infinity, and finite in units of 1 / LOG2_E too

template <class T>
struct Pairs;
template <>
struct Pairs<__nv_bfloat16> {
  using Two = __nv_bfloat162;
  static constexpr uint32_t LEAST = 0xff80ff80u;  // -infinity, twice
  static __device__ float2 wide(uint32_t x) { return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)}; }
  static __device__ uint32_t narrow(float a, float b) {
    const Two both = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
};
template <>
struct Pairs<__half> {
  using Two = __half2;
  static constexpr uint32_t LEAST = 0xfc00fc00u;
  static __device__ float2 wide(uint32_t x) { return __half22float2(*reinterpret_cast<const Two*>(&x)); }
  static __device__ uint32_t narrow(float a, float b) {
    const Two both = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
};

__device__ inline float exp2_of(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// To the same place in the shared memory of the cluster's block `rank`, whose barrier counts the bytes.
__device__ inline void send(float2* to, uint64_t* barrier, int rank, float2 value) {
  asm volatile(
      "{\n.reg .b32 there, counter;\n"
      "mapa.shared::cluster.u32 there, %0, %2;\n"
      "mapa.shared::cluster.u32 counter, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [there], {%3, %4}, [counter];\n}" ::"r"(
          address(to)),
      "r"(address(barrier)), "r"(rank), "f"(value.x), "f"(value.y)
      : "memory");
}

__device__ inline int rank_in_cluster() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A slot of the ring, and how often the ring has been gone through, of which barriers know one bit.
struct Place {
  int slot = 0;
  uint32_t parity = 0;
  const int slots;

  __device__ explicit Place(int count) : slots(count) {}
  __device__ void next() {
    if (++slot == slots) slot = 0, parity ^= 1;
  }
};

// Calls body(row, label, weight) for the rows of this cluster. Labels and weights are read a row ahead.
template <class Body>
__device__ void for_rows(const CrossEntropy& args, int blocks, Body body) {
  const int64_t step = gridDim.x / blocks;
  int64_t row = blockIdx.x / blocks, next = 0;
  float next_weight = 1.0f;
  const auto read = [&](int64_t at) {
    if (at >= args.rows) return;
    next = args.labels[at];
    if (args.weights != nullptr) next_weight = args.weights[at];
  };
  for (read(row); row < args.rows; row += step) {
    const int64_t label = next;
    const float weight = next_weight;
    read(row + step);
    body(row, label, weight);
  }
}

// Of all lanes, given to all of them.
__device__ inline float2 warp_total(float2 mine) {
  float top = mine.x;
#pragma unroll
  for (int lane = WARP / 2; lane > 0; lane /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, lane));
  float total = mine.y * exp2_of(mine.x - top);
#pragma unroll
  for (int lane = WARP / 2; lane > 0; lane /= 2) total += __shfl_xor_sync(0xffffffffu, total, lane);
  return {top, total};
}

// A thread's logits of one slot more. valid: vectors from `from` on that belong to the row.
template <class T>
__device__ inline void add(float& most, float2& sum, const uint4* from, int valid) {
  using Two = typename Pairs<T>::Two;
  constexpr uint32_t LEAST = Pairs<T>::LEAST;
  uint4 x[EACH];
  float top = most;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    x[i] = i * WARP < valid ? from[i * WARP] : make_uint4(LEAST, LEAST, LEAST, LEAST);
    const Two* two = reinterpret_cast<const Two*>(x + i);
    const Two larger = __hmax2(__hmax2(two[0], two[1]), __hmax2(two[2], two[3]));
    top = fmaxf(top, fmaxf(to_float(larger.x), to_float(larger.y)));
  }
  if (top > most) {
    const float shift = __fmul_rn(top, LOG2_E);
    sum = {shift, sum.y * exp2_of(sum.x - shift)};
    most = top;
  }
  float a = 0.0f, b = 0.0f;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const uint32_t pairs[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 both = Pairs<T>::wide(pairs[j]);
      a += exp2_of(fmaf(both.x, LOG2_E, -sum.x));
      b += exp2_of(fmaf(both.y, LOG2_E, -sum.x));
    }
  }
  sum.y += a + b;
}

template <class T>
__device__ inline uint4 gradients(const uint4& x, float shift, float of_softmax) {
  const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
  uint32_t result[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 both = Pairs<T>::wide(pairs[i]);
    result[i] = Pairs<T>::narrow(exp2_of(fmaf(both.x, LOG2_E, -shift)) * of_softmax,
                                 exp2_of(fmaf(both.y, LOG2_E, -shift)) * of_softmax);
  }
  return make_uint4(result[0], result[1], result[2], result[3]);
}

__device__ inline void put(uint4* to, const uint4& x) {  // as one store
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// What the three sides of a block know.
template <class T>
struct Share {
  const CrossEntropy& args;
  const Plan& plan;
  Shared& shared;
  uint4* ring;
  int rank, begin, vectors;  // the block's share of every row, in vectors

  __device__ Share(const CrossEntropy& args_, const Plan& plan_, Shared& shared_, uint4* ring_)
      : args(args_), plan(plan_), shared(shared_), ring(ring_), rank(rank_in_cluster()) {
    const int all = static_cast<int>(args.vocab / 8);
    begin = min(rank * plan.share, all);
    vectors = min(plan.share, all - begin);
  }
  __device__ uint4* of(int64_t row) const {
    return reinterpret_cast<uint4*>(static_cast<T*>(args.logits) + row * args.row_stride) + begin;
  }
  __device__ int bytes_of_sums() const { return plan.blocks * WARPS * static_cast<int>(sizeof(float2)); }

  __device__ void copy_rows() const;
  __device__ void sum_rows() const;
  __device__ void write_rows(float* loss) const;
};

template <class T>
__device__ void Share<T>::copy_rows() const {
  Place place(plan.slots);
  for_rows(args, plan.blocks, [&](int64_t row, int64_t label, float) {
    if (label == args.ignore) return;
    const uint4* from = of(row);
    for (int i = 0; i < plan.parts; ++i, place.next()) {
      wait(shared.empty + place.slot, place.parity ^ 1);
      const int count = min(SLOT, vectors - i * SLOT);
      if (count > 0) {
        expect(shared.full + place.slot, count * 16);
        copy_in(ring + place.slot * SLOT, from + i * SLOT, count * 16, shared.full + place.slot);
      } else {
        arrive(shared.full + place.slot);  // a short last share
      }
    }
  });
}

template <class T>
__device__ void Share<T>::sum_rows() const {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, mine = warp * WARP * EACH + lane;
  Place place(plan.slots);
  int turn = 0;
  for_rows(args, plan.blocks, [&](int64_t, int64_t label, float) {
    if (label == args.ignore) return;
    float most = LOWEST;
    float2 sum{LOWEST * LOG2_E, 0.0f};
    for (int i = 0; i < plan.parts; ++i, place.next()) {
      wait(shared.full + place.slot, place.parity);
      add<T>(most, sum, ring + place.slot * SLOT + mine, vectors - i * SLOT - mine);
    }
    sum = warp_total(sum);
    if (lane < plan.blocks)
      send(shared.sums[turn % TURNS] + rank * WARPS + warp, shared.ready + turn % TURNS, lane, sum);
    ++turn;
  });
}

template <class T>
__device__ void Share<T>::write_rows(float* loss) const {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP - WARPS, mine = warp * WARP * EACH + lane;
  Place place(plan.slots);
  int turn = 0;
  for_rows(args, plan.blocks, [&](int64_t row, int64_t label, float weight) {
    uint4* to = of(row);
    if (label == args.ignore) {
      for (int at = warp * WARP + lane; at < vectors; at += SIDE) put(to + at, make_uint4(0, 0, 0, 0));
      if (rank == 0 && warp == 0 && lane == 0) loss[row] = 0.0f;
      return;
    }
    wait<true>(shared.ready + turn % TURNS, turn / TURNS % 2);
    const float2 part = lane < plan.blocks * WARPS ? shared.sums[turn % TURNS][lane] : make_float2(LOWEST, 0.0f);
    const float2 sum = warp_total(part);
    if (warp == 0 && lane == 0) expect(shared.ready + turn % TURNS, bytes_of_sums());  // of a later turn
    ++turn;
    const float log_sum = LN_2 * (sum.x + log2f(sum.y));
    const float of_softmax = weight * (1.0f + 2.0f * args.z_loss * log_sum) / sum.y;
    // The label's own entry is written once more, rounded once, by the thread that has written its vector.
    const bool exists = label >= 0 && label < args.vocab;
    const int column = exists ? static_cast<int>(label) - begin * 8 : -1, vector = column / 8;
    const bool here = column >= 0 && vector < vectors && vector % SLOT / (WARP * EACH) == warp;
    T own = from_float<T>(0.0f);
    if (here) {
      const int slot = (place.slot + vector / SLOT) % plan.slots;
      const T target = reinterpret_cast<const T*>(ring + slot * SLOT + vector % SLOT)[column % 8];
      const float power = fmaf(to_float(target), LOG2_E, -sum.x);
      own = from_float<T>(fmaf(exp2_of(power), of_softmax, -weight));
      if (lane == 0) loss[row] = weight * (LN_2 * (log2f(sum.y) - power) + args.z_loss * log_sum * log_sum);
    }
    if (!exists && rank == 0 && warp == 0 && lane == 0) loss[row] = nanf("");
    for (int i = 0; i < plan.parts; ++i, place.next()) {
      wait(shared.full + place.slot, place.parity);
      const uint4* slot = ring + place.slot * SLOT + mine;
      const int at = i * SLOT + mine;
      uint4 x[EACH];
#pragma unroll
      for (int j = 0; j < EACH; ++j) x[j] = slot[j * WARP];
#pragma unroll
      for (int j = 0; j < EACH; ++j) {
        if (at + j * WARP >= vectors) continue;
        put(to + at + j * WARP, gradients<T>(x[j], sum.x, of_softmax));
        if (here && at + j * WARP == vector) reinterpret_cast<T*>(to)[column] = own;
      }
      // Not before what was read is in registers, as the stores show: a read may queue behind stores that the memory
      // holds up, and the barrier does not wait for it.
      __syncwarp();
      if (lane == 0) arrive(shared.empty + place.slot);
    }
  });
}

#endif

template <class T>
__global__ void __launch_bounds__(2 * SIDE + WARP, 1)
    cross_entropy_cluster_kernel(const CrossEntropy args, const Plan plan, float* loss) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint4 ring[];
  __shared__ Shared shared;
  const Share<T> share(args, plan, shared, ring);
  if (threadIdx.x == 0) {
    for (int i = 0; i < plan.slots; ++i) prepare(shared.full + i, 1), prepare(shared.empty + i, WARPS);
    for (int i = 0; i < TURNS; ++i) prepare(shared.ready + i, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    for (int i = 0; i < TURNS; ++i) expect(shared.ready + i, share.bytes_of_sums());
  }
  // No block leaves before all sums that are sent to it have come.
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (threadIdx.x < SIDE) {
    share.sum_rows();
  } else if (threadIdx.x < 2 * SIDE) {
    share.write_rows(loss);
  } else if (threadIdx.x == 2 * SIDE) {
    share.copy_rows();
  }
#endif
}

int shared_memory() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
  return bytes;
}

// The smallest cluster whose rings hold a third more than a row, so that a row is summed while the gradient of the one
// before is written; two blocks at least, as one has nobody to send to. blocks 0: there is none.
Plan plan_of(int64_t vocab) {
  const int room = std::min(MOST_SLOTS, (shared_memory() - OWN_SHARED) / (SLOT * 16));
  for (int blocks = 2; blocks <= MOST_BLOCKS; blocks *= 2) {
    const int64_t share = (vocab / 8 + blocks - 1) / blocks, parts = (share + SLOT - 1) / SLOT;
    if (4 * parts > 3 * room) continue;
    const int slots = std::min(room, TURNS / 2 * static_cast<int>(parts));
    return {blocks, static_cast<int>(share), static_cast<int>(parts), slots};
  }
  return {};
}

template <class T>
int launch(const CrossEntropy& args, float* loss, Stream stream) {
  const auto kernel = cross_entropy_cluster_kernel<T>;
  const Plan plan = plan_of(args.vocab);
  const int bytes = plan.slots * SLOT * 16;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return static_cast<int>(error);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(plan.blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.blocks);
  config.blockDim = dim3(2 * SIDE + WARP);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;  // that run at the same time: of four blocks fewer than a fourth of the multiprocessors
  error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (error != cudaSuccess) return static_cast<int>(error);
  config.gridDim.x *= static_cast<unsigned>(std::min<int64_t>(args.rows, std::max(1, clusters)));
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, args, plan, loss));
}

}  // namespace

bool cluster_takes(const CrossEntropy& args) {
  if (args.type == Type::f32 || args.softcap != 0.0f || args.smoothing != 0.0f) return false;
  if (args.vocab < LEAST_VOCAB || args.vocab % 8 != 0 || args.row_stride % 8 != 0 || !aligned({args.logits})) return false;
  cudaFuncAttributes found;  // code that was made from PTX for sm_80 is empty
  const cudaError_t error = cudaFuncGetAttributes(&found, cross_entropy_cluster_kernel<__nv_bfloat16>);
  return error == cudaSuccess && found.ptxVersion >= 90 && plan_of(args.vocab).blocks > 0;
}

int cross_entropy_cluster(const CrossEntropy& args, float* loss, Stream stream) {
  if (args.type == Type::bf16) return launch<__nv_bfloat16>(args, loss, stream);
  return launch<__half>(args, loss, stream);
}

}  // namespace megatune::cuda
