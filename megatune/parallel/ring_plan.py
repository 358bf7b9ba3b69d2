"""Which blocks of attention each context parallel process computes, and which keys it sends to whom.

From the borders of the documents alone, which all processes know; nothing is read from the device.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from weakref import WeakKeyDictionary

import torch

from megatune.ops import Segments
from megatune.ops.attention_blocks import Block

Range = tuple[int, int]  # rows [start, stop)


@dataclass(frozen=True)
class Rectangle:
    """Queries that see keys of an earlier chunk: all of them, or with `left` (as in `Block`) a band."""

    queries: Range
    keys: Range
    left: int | None = None


def rectangles(
    starts: Sequence[int], chunk: int, query_chunk: int, key_chunk: int, window: int | None
) -> list[Rectangle]:
    """What the queries of one chunk of the stream see of the keys of an earlier one, in rows of the stream.

    `starts`: first token of each document, and the end of the last. At most one document lies in both chunks: the one
    that covers everything between.
    """
    first_query, first_key = query_chunk * chunk, key_chunk * chunk
    stop_key = first_key + chunk
    document = bisect_right(starts, first_query) - 1
    first_key = max(first_key, starts[document])
    stop_query = min(first_query + chunk, starts[document + 1])
    if window is not None:
        first_key = max(first_key, first_query - window + 1)
        stop_query = min(stop_query, stop_key - 1 + window)
    if first_key >= stop_key or first_query >= stop_query:
        return []
    if window is None or stop_query - 1 - first_key < window:
        return [Rectangle((first_query, stop_query), (first_key, stop_key))]
    left = window - 1 - (stop_query - stop_key)
    # FlashAttention hides the last keys from the first queries of a band with more queries than keys, so those
    # queries that see all keys are taken out of it.
    dense = first_key + window if stop_query - first_query > stop_key - first_key else first_query
    band = Rectangle((dense, stop_query), (first_key, stop_key), left)
    return [Rectangle((first_query, dense), (first_key, stop_key)), band] if dense > first_query else [band]


def _local(rows: Range, chunk: int, size: int) -> Range:
    """Rows of the stream that lie in one chunk -> rows of the process that holds it."""
    index = rows[0] // chunk
    shift = (0 if index < size else chunk) - index * chunk
    return rows[0] + shift, rows[1] + shift


def _pair(
    starts: Sequence[int], chunk: int, receiver: int, sender: int, size: int, window: int | None
) -> list[Rectangle]:
    """What the queries of `receiver` see of the keys of `sender`, in rows of these two; chunks by themselves are left
    out."""
    found: list[Rectangle] = []
    for query_chunk in (receiver, 2 * size - 1 - receiver):
        for key_chunk in (sender, 2 * size - 1 - sender):
            if key_chunk < query_chunk:
                for part in rectangles(starts, chunk, query_chunk, key_chunk, window):
                    rows = (_local(part.queries, chunk, size), _local(part.keys, chunk, size))
                    found.append(Rectangle(*rows, part.left))
    return found


def _joined(parts: list[Rectangle]) -> list[Rectangle]:
    """Two rectangles that are one in the rows of their processes become one: larger products, fewer to add up."""
    if len(parts) != 2 or parts[0].left is not None or parts[1].left is not None:
        return parts
    a, b = parts
    if a.keys == b.keys and a.queries[1] == b.queries[0]:
        return [Rectangle((a.queries[0], b.queries[1]), a.keys)]
    if a.queries == b.queries and a.keys[1] == b.keys[0]:
        return [Rectangle(a.queries, (a.keys[0], b.keys[1]))]
    return parts


def _union(ranges: Sequence[Range]) -> list[Range]:
    """The rows in any of the ranges, as ranges in order."""
    union: list[Range] = []
    for start, stop in sorted(ranges):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(stop, union[-1][1]))
        else:
            union.append((start, stop))
    return union


@dataclass(frozen=True, eq=False)
class Meeting:
    """One block to compute: rows of this process's queries, rows of the keys at hand."""

    queries: slice
    keys: slice
    block: Block


@dataclass(frozen=True, eq=False)
class Round:
    """Round j: `sends`, the rows of this process's keys that process rank + j sees; `receives`, the number of rows that
    come from process rank - j; `meetings` with these."""

    sends: tuple[slice, ...]
    receives: int
    meetings: tuple[Meeting, ...]

    @property
    def sent(self) -> int:
        return sum(rows.stop - rows.start for rows in self.sends)


@dataclass(frozen=True, eq=False)
class Plan:
    """What a process computes of a micro-batch's attention and what it sends; `own` needs nobody else's keys."""

    own: tuple[Meeting, ...]
    rounds: tuple[Round, ...]


# Made once for a micro-batch and used by all layers with the same window.
_PLANS: WeakKeyDictionary[Segments, dict[tuple[int, int, int | None], Plan]] = WeakKeyDictionary()


def plan_of(segments: Segments, rank: int, size: int, window: int | None) -> Plan:
    """The plan of process `rank` of `size` for a stream with these borders. Reads nothing from the device."""
    if window is not None and window >= segments.max_seqlen:
        window = None
    plans = _PLANS.setdefault(segments, {})
    if (rank, size, window) not in plans:
        plans[rank, size, window] = _plan(segments, rank, size, window)
    return plans[rank, size, window]


def _plan(segments: Segments, rank: int, size: int, window: int | None) -> Plan:
    starts = [0, *accumulate(segments.lengths)]
    chunk = starts[-1] // (2 * size)
    device = segments.cu_seqlens.device

    def meetings(parts: list[Rectangle], ranges: Sequence[Range]) -> tuple[Meeting, ...]:
        """Of rectangles whose keys lie one after the other as `ranges` says."""
        found = []
        for part in parts:
            start = sum(min(stop, part.keys[0]) - begin for begin, stop in ranges if begin <= part.keys[0])
            length = part.keys[1] - part.keys[0]
            block = _rectangle_block(part.queries[1] - part.queries[0], length, part.left, device)
            found.append(Meeting(slice(*part.queries), slice(start, start + length), block))
        return tuple(found)

    rounds = []
    for step in range(1, size):
        sends = _pair(starts, chunk, (rank + step) % size, rank, size, window)
        seen = _pair(starts, chunk, rank, (rank - step) % size, size, window)
        ranges = _union([part.keys for part in seen])
        rounds.append(
            Round(
                tuple(slice(*rows) for rows in _union([part.keys for part in sends])),
                sum(stop - start for start, stop in ranges),
                meetings(_joined(seen), ranges),
            )
        )
    whole = slice(0, 2 * chunk)
    diagonal = Meeting(whole, whole, _diagonal_block(segments, starts, chunk, rank, size, window))
    own = meetings(_pair(starts, chunk, rank, rank, size, window), [(0, 2 * chunk)])
    return Plan((diagonal, *own), tuple(rounds))


def _rectangle_block(queries: int, keys: int, left: int | None, device: torch.device) -> Block:
    borders = (torch.arange(0, n + 1, n, dtype=torch.int32, device=device) for n in (queries, keys))
    return Block((queries,), (keys,), *borders, left)


def _diagonal_block(
    segments: Segments, starts: list[int], chunk: int, rank: int, size: int, window: int | None
) -> Block:
    """Both chunks of a process by themselves: causal within each piece of a document."""
    lengths: list[int] = []
    borders = [segments.cu_seqlens.new_zeros(1)]
    for place, index in enumerate((rank, 2 * size - 1 - rank)):
        begin, end = index * chunk, (index + 1) * chunk
        first, last = bisect_right(starts, begin) - 1, bisect_left(starts, end)
        lengths += [min(starts[i + 1], end) - max(starts[i], begin) for i in range(first, last)]
        ends = segments.cu_seqlens[first + 1 : last + 1].clamp(begin, end)
        borders.append(ends - begin + place * chunk)
    cu_seqlens = torch.cat(borders)
    left = None if window is None else window - 1
    return Block(tuple(lengths), tuple(lengths), cu_seqlens, cu_seqlens, left, 0)
