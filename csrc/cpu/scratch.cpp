#include "scratch.h"

#include <cstdlib>
#include <utility>

namespace megatune::cpu {

namespace {

// Freed memory of this thread.
class Cache {
 public:
  ~Cache() {
    for (Block& block : blocks_) std::free(block.data);
  }
  void* take(int64_t bytes, int64_t& capacity) {
    for (Block& block : blocks_) {
      if (block.capacity < bytes || block.capacity > 4 * bytes) continue;
      capacity = std::exchange(block.capacity, 0);
      return std::exchange(block.data, nullptr);
    }
    capacity = bytes;
    void* data = std::aligned_alloc(64, bytes);
    if (data == nullptr) std::abort();  // out of memory on a worker thread: nothing could catch an exception
    return data;
  }
  void give(void* data, int64_t capacity) {
    Block* least = &blocks_[0];
    for (Block& block : blocks_)
      if (block.capacity < least->capacity) least = &block;
    if (least->capacity < capacity) {
      std::swap(least->data, data);
      least->capacity = capacity;
    }
    std::free(data);
  }

 private:
  struct Block {
    void* data = nullptr;
    int64_t capacity = 0;
  };
  Block blocks_[16];
};
thread_local Cache cache;

}  // namespace

void* take_scratch(int64_t bytes, int64_t& capacity) { return cache.take(bytes, capacity); }

void give_scratch(void* data, int64_t capacity) { cache.give(data, capacity); }

}  // namespace megatune::cpu
