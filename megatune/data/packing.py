"""Samples into sequences: best-fit decreasing, the same bins whoever computes them.

Rule: samples by length, longest first, of equal ones the lower number first; each goes into the open bin with the
least room that still holds it, of equal ones the lowest numbered; else it opens a new bin. Bins are numbered in the
order of their opening. (Best-fit decreasing uses at most 11/9 of the fewest bins possible, plus 4: Johnson 1973.)
"""

from __future__ import annotations

from bisect import bisect_left, insort
from heapq import heappop, heappush

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Bin of each sample: int64 [samples]. `lengths`: int64 [samples], each from 1 to `capacity` (else ValueError).

    Uses the compiled extension where it was built; the result is the same without it.
    """
    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths must be from 1 to {capacity}, found {lengths.min()} to {lengths.max()}")
    try:
        from megatune import _pack
    except ImportError:
        return best_fit_reference(lengths, capacity)
    return np.asarray(_pack.best_fit(lengths, capacity), dtype=np.int64)


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
