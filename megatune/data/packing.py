"""Samples into sequences: best-fit decreasing, the same bins whoever computes them.

Rule: samples by length, longest first, of equal ones the lower number first; each goes into the open bin with the
least room that still holds it, of equal ones the lowest numbered; else it opens a new bin. Bins are numbered in the
order of their opening. (Best-fit decreasing uses at most 11/9 of the fewest bins possible, plus 4: Johnson 1973.)
"""

from __future__ import annotations

import warnings
from bisect import bisect_left, insort
from heapq import heappop, heappush

import numpy as np

try:
    from megatune import _pack
except ImportError:  # not built: the references below compute the same
    _pack = None
if _pack is not None and not hasattr(_pack, "sequence_index"):
    warnings.warn(
        f"{_pack.__file__} is of another version of megatune and is not used; build it again with pip install "
        "--no-build-isolation -e .",
        stacklevel=2,
    )
    _pack = None


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Bin of each sample: int64 [samples]. `lengths`: int64 [samples], contiguous, each from 1 to `capacity`.

    Uses the compiled extension where it was built; the result is the same without it. Memory beside the two arrays,
    compiled: 4 bytes a sample and at most 8 a bin (twice that from 2**32 samples on). ValueError, naming the argument,
    for other lengths, a capacity below 1, another dtype or a strided array: nothing is converted.
    """
    _check("best_fit", lengths=lengths)
    if _pack is not None:
        return _pack.best_fit(lengths, capacity)
    if capacity < 1:
        raise ValueError(f"best_fit: capacity is {capacity}, must be 1 or more")
    wrong = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(f"best_fit: lengths[{first}] is {lengths[first]}, must be 1 to {capacity}")
    return best_fit_reference(lengths, capacity)


def sequence_index(
    bins: np.ndarray, lengths: np.ndarray, targets: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What stands in each of `count` bins: (starts [count + 1], samples [n], tokens [count], targets [count]), int64.

    The samples of a bin, ascending, are samples[starts[bin] : starts[bin + 1]]; tokens and targets are sums over them.
    `bins` (from `best_fit`), `lengths`, `targets`: int64 [n], contiguous. In O(n), with 8 (n + 3 count) bytes of
    results and none beside them where the extension is built. ValueError for other shapes, dtypes or bins.
    """
    _check("sequence_index", bins=bins, lengths=lengths, targets=targets)
    if _pack is not None:
        return _pack.sequence_index(bins, lengths, targets, count)
    for name, values in {"lengths": lengths, "targets": targets}.items():
        if len(values) != len(bins):
            raise ValueError(f"sequence_index: {name} has {len(values)} items, bins has {len(bins)}")
    wrong = np.flatnonzero((bins < 0) | (bins >= count))
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(f"sequence_index: bins[{first}] is {bins[first]}, must be 0 to {count - 1}")
    return sequence_index_reference(bins, lengths, targets, count)


def _check(function: str, **arrays: np.ndarray) -> None:
    for name, values in arrays.items():
        if not isinstance(values, np.ndarray) or values.dtype != np.int64 or values.ndim != 1:
            found = (
                f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
            )
            raise ValueError(f"{function}: {name} must be int64 [n], got {found}")
        if not values.flags.c_contiguous:
            raise ValueError(
                f"{function}: {name} must be contiguous, got a stride of {values.strides[0]} bytes"
            )


def best_fit_reference(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """`best_fit` in Python: a heap of bins for each amount of room, O(n log n + n * different amounts of room)."""
    bins = np.empty(len(lengths), dtype=np.int64)
    open_bins: dict[int, list[int]] = {}  # room -> heap of bin numbers
    rooms: list[int] = []  # amounts of room that some bin has, ascending
    opened = 0
    sizes = lengths.tolist()
    for sample in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        size = sizes[sample]
        at = bisect_left(rooms, size)
        if at == len(rooms):
            number, room = opened, capacity
            opened += 1
        else:
            room = rooms[at]
            heap = open_bins[room]
            number = heappop(heap)
            if not heap:
                del open_bins[room], rooms[at]
        bins[sample] = number
        left = room - size
        if left:
            if left not in open_bins:
                open_bins[left] = []
                insort(rooms, left)
            heappush(open_bins[left], number)
    return bins


def sequence_index_reference(
    bins: np.ndarray, lengths: np.ndarray, targets: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`sequence_index` in NumPy, O(n log n)."""
    sums = np.zeros((2, count), dtype=np.int64)
    np.add.at(sums[0], bins, lengths)
    np.add.at(sums[1], bins, targets)
    starts = np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=count))])
    return starts.astype(np.int64), np.argsort(bins, kind="stable"), sums[0], sums[1]
