// Sum of squares over many tensors, in two stages whose order is fixed, and whether every element is finite.

#include "elements.cuh"

namespace megatune::cuda {
namespace {

constexpr int THREADS = 256;

struct Table : Batch<NormTensor, 1000> {
  double* partials;  // [chunks, 2]
};
static_assert(sizeof(Table) <= 32764, "a kernel's arguments have at most this many bytes");

// (sum, number of those not finite) over the block, the same order each time; valid in thread 0.
__device__ inline void block_sum(double& sum, double& bad) {
  __shared__ double sums[THREADS], bads[THREADS];
  sums[threadIdx.x] = sum;
  bads[threadIdx.x] = bad;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      sums[threadIdx.x] += sums[threadIdx.x + half];
      bads[threadIdx.x] += bads[threadIdx.x + half];
    }
  }
  sum = sums[0];
  bad = bads[0];
}

__device__ inline void add(float x, float& sum, bool& bad) {
  sum = fmaf(x, x, sum);
  bad |= !isfinite(x);
}

__device__ inline float4 four(const float* from) { return *reinterpret_cast<const float4*>(from); }
__device__ inline float4 four(const __nv_bfloat16* from) { return load_low(from); }
__device__ inline float one(const float* from) { return *from; }
__device__ inline float one(const __nv_bfloat16* from) { return __bfloat162float(*from); }

__device__ inline void add(float4 x, float& sum, bool& bad) {
  add(x.x, sum, bad);
  add(x.y, sum, bad);
  add(x.z, sum, bad);
  add(x.w, sum, bad);
}

// begin..whole in fours, the rest one by one. Of a whole chunk eight loads are on their way at once.
template <class T>
__device__ inline void add_all(const T* data, int64_t begin, int64_t whole, int64_t end, float& sum, bool& bad) {
  constexpr int stride = THREADS * 4, ahead = 8;
  static_assert(NORM_CHUNK % (stride * ahead) == 0);
  const T* from = data + begin + threadIdx.x * 4;
  if (whole - begin == NORM_CHUNK) {
    for (int i = 0; i < NORM_CHUNK; i += stride * ahead) {
      float4 x[ahead];
#pragma unroll
      for (int j = 0; j < ahead; ++j) x[j] = four(from + i + j * stride);
#pragma unroll
      for (int j = 0; j < ahead; ++j) add(x[j], sum, bad);
    }
  } else {
    const int64_t mine = whole - begin - static_cast<int>(threadIdx.x) * 4;
    for (int64_t i = 0; i < mine; i += stride) add(four(from + i), sum, bad);
  }
  for (int64_t i = whole + threadIdx.x; i < end; i += THREADS) add(one(data + i), sum, bad);
}

__global__ void __launch_bounds__(THREADS) partial_kernel(const __grid_constant__ Table table) {
  const int chunk = blockIdx.x;
  const int low = table.holder(chunk);
  const NormTensor& t = table.tensors[low];
  const int64_t begin = static_cast<int64_t>(chunk - table.first[low]) * NORM_CHUNK;
  const int64_t end = min(begin + NORM_CHUNK, t.n);
  float sum = 0.0f;
  bool bad = false;
  const bool fits = reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
  const int64_t whole = fits ? begin + (end - begin) / 4 * 4 : begin;
  if (t.low) {
    add_all(static_cast<const __nv_bfloat16*>(t.data), begin, whole, end, sum, bad);
  } else {
    add_all(static_cast<const float*>(t.data), begin, whole, end, sum, bad);
  }
  double total = sum, bads = bad ? 1.0 : 0.0;
  block_sum(total, bads);
  if (threadIdx.x == 0) {
    table.partials[2 * chunk] = total;
    table.partials[2 * chunk + 1] = bads;
  }
}

__global__ void __launch_bounds__(THREADS) total_kernel(const double* partials, int64_t chunks, double* out) {
  double sum = 0.0, bad = 0.0;
  for (int64_t i = threadIdx.x; i < chunks; i += THREADS) {
    sum += partials[2 * i];
    bad += partials[2 * i + 1];
  }
  block_sum(sum, bad);
  if (threadIdx.x == 0) {
    out[0] = sum;
    out[1] = bad > 0.0 ? 1.0 : 0.0;
  }
}

}  // namespace

int64_t square_sum_chunks(const NormTensor* tensors, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += (tensors[i].n + NORM_CHUNK - 1) / NORM_CHUNK;
  return chunks;
}

int square_sum(const NormTensor* tensors, int64_t count, double* partials, double* out, Stream stream) {
  Table table;
  table.partials = partials;
  for (int64_t at = 0; at < count;) {
    at = table.fill(tensors, at, count, NORM_CHUNK);
    if (table.count == 0) break;
    partial_kernel<<<table.chunks(), THREADS, 0, stream>>>(table);
    const int error = launched();
    if (error != 0) return error;
    table.partials += 2 * static_cast<int64_t>(table.chunks());
  }
  total_kernel<<<1, THREADS, 0, stream>>>(partials, (table.partials - partials) / 2, out);
  return launched();
}

}  // namespace megatune::cuda
