// Best-fit-decreasing bin packing (Johnson 1973), deterministic, and the index of what it packed.
//
// Items of one length are packed together. Among the open bins those with the least room that fits go first, of equal
// ones the lowest number; a bin that is chosen takes items until the next one does not fit, since what is left of it
// is then the least room that fits. So the work is O(n + bins * log): counting sort by length, a segment tree over the
// amounts of room that says which is the least one that fits, and for each amount the bins that have it.
//
// Numbers of items and bins are 32 bits wide below 2^32 items, else 64.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

// Above this many amounts of room a table of them is larger than it is worth; then they are an ordered map.
constexpr int64_t kMostRooms = int64_t{1} << 22;

// Bins that have one amount of room, the lowest first. They mostly come in ascending order: then they wait in a queue,
// the others in a heap.
template <class Number>
class Bins {
 public:
  void push(Number bin) {
    if (first_ == queue_.size() || queue_.back() < bin) {
      if (first_ == queue_.size()) {
        queue_.clear();
        first_ = 0;
      }
      queue_.push_back(bin);
    } else {
      heap_.push_back(bin);
      std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
    }
  }

  Number pop() {
    if (heap_.empty() || (first_ < queue_.size() && queue_[first_] < heap_.front())) return queue_[first_++];
    std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
    const Number bin = heap_.back();
    heap_.pop_back();
    return bin;
  }

  bool empty() const { return first_ == queue_.size() && heap_.empty(); }

  void release() { *this = Bins(); }

 private:
  std::vector<Number> queue_, heap_;
  size_t first_ = 0;
};

// Which of the amounts 0 .. capacity some bin has: a segment tree with 64 children a node, whose nodes are words of
// bits.
class Tree {
 public:
  explicit Tree(int64_t capacity) {
    uint64_t leaves = static_cast<uint64_t>(capacity) + 1;
    do {
      leaves = (leaves + 63) / 64;
      levels_.emplace_back(leaves, 0);
    } while (leaves > 1);
  }

  void set(uint64_t at) {
    for (auto& level : levels_) {
      level[at / 64] |= uint64_t{1} << (at % 64);
      at /= 64;
    }
  }

  void clear(uint64_t at) {
    for (auto& level : levels_) {
      level[at / 64] &= ~(uint64_t{1} << (at % 64));
      if (level[at / 64]) return;
      at /= 64;
    }
  }

  // The least amount from `at` on, or -1.
  int64_t least(uint64_t at) const {
    for (size_t depth = 0; depth < levels_.size(); ++depth) {
      if (at / 64 >= levels_[depth].size()) return -1;
      const uint64_t word = levels_[depth][at / 64] >> (at % 64);
      if (word) {
        at += std::countr_zero(word);
        while (depth-- > 0) at = at * 64 + std::countr_zero(levels_[depth][at]);
        return static_cast<int64_t>(at);
      }
      at = at / 64 + 1;
    }
    return -1;
  }

 private:
  std::vector<std::vector<uint64_t>> levels_;
};

template <class Number>
class TableOfRooms {
 public:
  explicit TableOfRooms(int64_t capacity) : tree_(capacity), bins_(capacity + 1) {}

  int64_t least(int64_t length) const { return tree_.least(length); }

  Number pop(int64_t room) {
    const Number bin = bins_[room].pop();
    if (bins_[room].empty()) {
      bins_[room].release();
      tree_.clear(room);
    }
    return bin;
  }

  void push(int64_t room, Number bin) {
    if (bins_[room].empty()) tree_.set(room);
    bins_[room].push(bin);
  }

 private:
  Tree tree_;
  std::vector<Bins<Number>> bins_;
};

template <class Number>
class MapOfRooms {
 public:
  explicit MapOfRooms(int64_t) {}

  int64_t least(int64_t length) const {
    const auto found = bins_.lower_bound(length);
    return found == bins_.end() ? -1 : found->first;
  }

  Number pop(int64_t room) {
    const auto found = bins_.find(room);
    const Number bin = found->second.pop();
    if (found->second.empty()) bins_.erase(found);
    return bin;
  }

  void push(int64_t room, Number bin) { bins_[room].push(bin); }

 private:
  std::map<int64_t, Bins<Number>> bins_;
};

// The bins of `count` items of one length, one after the other, to `slots`; returns how many bins are open after it.
template <class Number, class Rooms>
int64_t pack_equal(int64_t length, int64_t count, int64_t capacity, int64_t opened, Rooms& rooms, Number* slots) {
  while (count > 0) {
    int64_t room = rooms.least(length);
    Number bin;
    if (room < 0) {
      room = capacity;
      bin = static_cast<Number>(opened++);
    } else {
      bin = rooms.pop(room);
    }
    const int64_t taken = std::min(count, room / length);
    slots = std::fill_n(slots, taken, bin);
    count -= taken;
    if (room > taken * length) rooms.push(room - taken * length, bin);
  }
  return opened;
}

std::string wrong_length(int64_t item, int64_t length, int64_t capacity) {
  return "best_fit: lengths[" + std::to_string(item) + "] is " + std::to_string(length) + ", must be 1 to " +
         std::to_string(capacity);
}

[[noreturn]] void changed() { throw std::invalid_argument("best_fit: lengths changed while they were packed"); }

// Few lengths: counted. Memory beside input and output: `Number` a slot an item and one a bin (with a vector's slack).
template <class Number>
void pack_counted(const int64_t* lengths, int64_t count, int64_t capacity, int64_t* bins) {
  std::vector<Number> next(capacity + 1, 0);  // items of each length, then the slot of the next one
  for (int64_t i = 0; i < count; ++i) {
    if (lengths[i] < 1 || lengths[i] > capacity)
      throw std::invalid_argument(wrong_length(i, lengths[i], capacity));
    ++next[lengths[i]];
  }
  std::vector<Number> slots(count);
  {
    TableOfRooms<Number> rooms(capacity);
    int64_t opened = 0, first = 0;
    for (int64_t length = capacity; length > 0; --length) {
      const int64_t here = next[length];
      if (!here) continue;
      opened = pack_equal<Number>(length, here, capacity, opened, rooms, slots.data() + first);
      next[length] = static_cast<Number>(first);
      first += here;
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = lengths[i];
    // Another thread may write to the array meanwhile: that must not lead out of ours.
    if (length < 1 || length > capacity || static_cast<int64_t>(next[length]) >= count) changed();
    bins[i] = static_cast<int64_t>(slots[next[length]++]);
  }
}

// Lengths from a wide range: sorted.
template <class Number>
void pack_sorted(const int64_t* lengths, int64_t count, int64_t capacity, int64_t* bins) {
  const std::vector<int64_t> own(lengths, lengths + count);
  for (int64_t i = 0; i < count; ++i) {
    if (own[i] < 1 || own[i] > capacity) throw std::invalid_argument(wrong_length(i, own[i], capacity));
  }
  std::vector<Number> order(count), slots(count);
  std::iota(order.begin(), order.end(), Number{0});
  std::stable_sort(order.begin(), order.end(), [&](Number a, Number b) { return own[a] > own[b]; });
  MapOfRooms<Number> rooms(capacity);
  int64_t opened = 0;
  for (int64_t first = 0, last = 0; first < count; first = last) {
    while (last < count && own[order[last]] == own[order[first]]) ++last;
    opened = pack_equal<Number>(own[order[first]], last - first, capacity, opened, rooms, slots.data() + first);
  }
  for (int64_t i = 0; i < count; ++i) bins[order[i]] = static_cast<int64_t>(slots[i]);
}

template <class Number>
void pack(const int64_t* lengths, int64_t count, int64_t capacity, int64_t* bins) {
  if (capacity <= kMostRooms) {
    pack_counted<Number>(lengths, count, capacity, bins);
  } else {
    pack_sorted<Number>(lengths, count, capacity, bins);
  }
}

bool is_narrow(int64_t count) { return count < static_cast<int64_t>(std::numeric_limits<uint32_t>::max()); }

// The array's numbers as they lie in memory; nothing is converted or copied.
const int64_t* numbers(const py::array& array, const char* op, const char* name) {
  const std::string at = std::string(op) + ": " + name;
  if (!py::dtype::of<int64_t>().equal(array.dtype()))
    throw std::invalid_argument(at + " must be int64, got " + py::str(array.dtype()).cast<std::string>());
  if (array.ndim() != 1)
    throw std::invalid_argument(at + " must have one dimension, got " + std::to_string(array.ndim()));
  if (array.shape(0) > 1 && array.strides(0) != sizeof(int64_t))
    throw std::invalid_argument(at + " must be contiguous, got a stride of " + std::to_string(array.strides(0)) +
                                " bytes");
  return static_cast<const int64_t*>(array.data());
}

py::array_t<int64_t> best_fit(const py::array& lengths, int64_t capacity) {
  const int64_t* data = numbers(lengths, "best_fit", "lengths");
  if (capacity < 1)
    throw std::invalid_argument("best_fit: capacity is " + std::to_string(capacity) + ", must be 1 or more");
  const int64_t count = lengths.shape(0);
  py::array_t<int64_t> bins(count);
  int64_t* to = bins.mutable_data();
  py::gil_scoped_release release;
  if (is_narrow(count)) {
    pack<uint32_t>(data, count, capacity, to);
  } else {
    pack<uint64_t>(data, count, capacity, to);
  }
  return bins;
}

std::string wrong_bin(int64_t item, int64_t bin, int64_t count) {
  return "sequence_index: bins[" + std::to_string(item) + "] is " + std::to_string(bin) + ", must be 0 to " +
         std::to_string(count - 1);
}

py::tuple sequence_index(const py::array& bins, const py::array& lengths, const py::array& targets, int64_t count) {
  const char* op = "sequence_index";
  const int64_t* of = numbers(bins, op, "bins");
  const int64_t* length = numbers(lengths, op, "lengths");
  const int64_t* target = numbers(targets, op, "targets");
  const int64_t items = bins.shape(0);
  for (const auto& [array, name] : {std::pair{&lengths, "lengths"}, std::pair{&targets, "targets"}}) {
    if (array->shape(0) != items)
      throw std::invalid_argument(std::string(op) + ": " + name + " has " + std::to_string(array->shape(0)) +
                                  " items, bins has " + std::to_string(items));
  }
  if (count < 0) throw std::invalid_argument(std::string(op) + ": count is " + std::to_string(count));
  py::array_t<int64_t> starts(count + 1), samples(items), tokens(count), learnt(count);
  int64_t *start = starts.mutable_data(), *sample = samples.mutable_data();
  int64_t *token = tokens.mutable_data(), *learn = learnt.mutable_data();
  {
    py::gil_scoped_release release;
    std::fill_n(start, count + 1, 0);
    std::fill_n(token, count, 0);
    std::fill_n(learn, count, 0);
    for (int64_t i = 0; i < items; ++i) {
      const int64_t bin = of[i];
      if (bin < 0 || bin >= count) throw std::invalid_argument(wrong_bin(i, bin, count));
      ++start[bin];
      token[bin] += length[i];
      learn[bin] += target[i];
    }
    // Ends of the bins; filled from behind they become the beginnings.
    std::partial_sum(start, start + count, start);
    start[count] = items;
    for (int64_t i = items; i-- > 0;) {
      const int64_t bin = of[i];
      if (bin < 0 || bin >= count || start[bin] < 1)
        throw std::invalid_argument("sequence_index: bins changed while they were read");
      sample[--start[bin]] = i;
    }
  }
  return py::make_tuple(starts, samples, tokens, learnt);
}

}  // namespace

PYBIND11_MODULE(_pack, m) {
  m.doc() = "Packing of samples into sequences. The interpreter's lock is released while it computes.";
  m.def("best_fit", &best_fit, py::arg("lengths").noconvert(), py::arg("capacity"),
        "Bin of each item (int64 [n], contiguous -> int64 [n]), bins numbered by first use. Items go longest first,\n"
        "ties by lower index, each into the open bin with the least room that fits, ties by lower number. Memory\n"
        "beside the result: 4 bytes an item and at most 8 a bin (twice that from 2^32 items on). ValueError for a\n"
        "length below 1 or above capacity, another dtype or stride.");
  m.def("sequence_index", &sequence_index, py::arg("bins").noconvert(), py::arg("lengths").noconvert(),
        py::arg("targets").noconvert(), py::arg("count"),
        "(starts [count + 1], samples [n], sums of lengths [count], sums of targets [count]), int64: the items of\n"
        "each of `count` bins, ascending, are samples[starts[bin] : starts[bin + 1]]. All arrays int64, contiguous,\n"
        "[n]. No memory beside the results. ValueError for a bin that is not below count, other shapes or dtypes.");
}
