// Best-fit-decreasing bin packing (Johnson 1973), deterministic: O(n log n) through one ordered set of open bins.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;
using Array = py::array_t<int64_t, py::array::c_style>;

namespace {

std::vector<int64_t> pack(const int64_t* lengths, int64_t count, int64_t capacity) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  std::vector<int64_t> bins(count);
  std::set<std::pair<int64_t, int64_t>> open;  // (space left, bin): the first that fits is the fullest, then the lowest
  int64_t used = 0;
  for (const int64_t item : order) {
    const int64_t length = lengths[item];
    const auto best = open.lower_bound({length, -1});
    int64_t space = capacity, bin = used;
    if (best == open.end()) {
      ++used;
    } else {
      std::tie(space, bin) = *best;
      open.erase(best);
    }
    bins[item] = bin;
    if (space > length) open.insert({space - length, bin});
  }
  return bins;
}

Array best_fit(const Array& lengths, int64_t capacity) {
  if (lengths.ndim() != 1) throw std::invalid_argument("best_fit: lengths must have one dimension");
  const int64_t count = lengths.shape(0);
  const int64_t* data = lengths.data();
  for (int64_t i = 0; i < count; ++i) {
    if (data[i] < 1 || data[i] > capacity)
      throw std::invalid_argument("best_fit: item " + std::to_string(i) + " has length " + std::to_string(data[i]) +
                                  ", must be 1 to " + std::to_string(capacity));
  }
  std::vector<int64_t> bins;
  {
    py::gil_scoped_release release;
    bins = pack(data, count, capacity);
  }
  return Array(count, bins.data());
}

}  // namespace

PYBIND11_MODULE(_pack, m) {
  m.doc() = "Packing of samples into sequences.";
  m.def("best_fit", &best_fit, py::arg("lengths"), py::arg("capacity"),
        "Bin of each item (int64 [n] -> int64 [n]), bins numbered by first use. Items go longest first, ties by lower\n"
        "index, each into the open bin with the least space that fits, ties by lower number. ValueError for a length\n"
        "below 1 or above capacity.");
}
