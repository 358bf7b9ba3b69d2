// The memory traffic of an AdamW step and next to no arithmetic: the limit that benchmarks/optim_cpu.py measures.
//
// Three fp32 streams are read, multiplied by a number and written back; a stream of 16-bit numbers is read and written
// elsewhere: 28 bytes an element. In pieces of `piece` elements of each stream in turn, each thread on its own part.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int64_t AHEAD = 1024;  // elements

template <bool prefetch>
void scale(float* x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; i += 256) {
    if constexpr (prefetch)
      for (int64_t j = 0; j < 256; j += 16) __builtin_prefetch(x + i + AHEAD + j, 1, 3);
    const int64_t stop = std::min<int64_t>(256, n - i);
    for (int64_t j = 0; j < stop; ++j) x[i + j] *= factor;
  }
}

void copy(const uint16_t* from, uint16_t* to, int64_t n, bool stream) {
  if (!stream) {
    std::memcpy(to, from, static_cast<size_t>(n) * 2);
    return;
  }
  int64_t i = 0;
  for (; i < n && reinterpret_cast<uintptr_t>(to + i) % 16 != 0; ++i) to[i] = from[i];
  for (; i + 8 <= n; i += 8)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  for (; i < n; ++i) to[i] = from[i];
}

}  // namespace

extern "C" void read_modify_write(float* a, float* b, float* c, const uint16_t* from, uint16_t* to, int64_t n,
                                  int threads, int64_t piece, int stream, int prefetch, float factor) {
  const auto part = [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += piece) {
      const int64_t count = std::min(piece, end - i);
      for (float* x : {a, b, c}) prefetch ? scale<true>(x + i, count, factor) : scale<false>(x + i, count, factor);
      copy(from + i, to + i, count, stream != 0);
    }
    _mm_sfence();
  };
  std::vector<std::thread> pool;
  const int64_t each = (n / threads + 63) / 64 * 64;
  for (int64_t begin = each; begin < n; begin += each) pool.emplace_back(part, begin, std::min(n, begin + each));
  part(0, std::min(n, each));
  for (std::thread& one : pool) one.join();
}
