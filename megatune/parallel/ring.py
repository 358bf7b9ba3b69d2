"""Ring attention (arXiv:2310.01889) on packed documents, balanced by zigzag.

The keys go round the context parallel processes while the queries stay, and the partial results join by their
log-sum-exp. Here a round is a shift: in round j each process sends to the process j places further, and only those keys
that its queries see. As all processes know the borders of the documents, what nobody sees is neither sent nor computed:
later chunks, other documents, keys before the window. With short documents next to nothing is sent, with one long
document as much as on a ring that passes whole chunks on, less a quarter. The gradients of keys and values go straight
back to the process they belong to, in the keys' dtype instead of travelling along as a sum in fp32.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatune.ops import Segments
from megatune.ops.attention_blocks import (
    Block,
    add_sinks,
    block_attention,
    block_attention_backward,
    sinks_gradient,
)
from megatune.ops.checks import accumulate_dtype
from megatune.parallel.collectives import sum_, swap
from megatune.parallel.world import Axis

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

_MET: WeakSet[dist.ProcessGroup] = WeakSet()  # groups that have communicated


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


def _pack(k: Tensor, v: Tensor, rows: Sequence[slice]) -> Tensor:
    """These rows of k, then these of v, as one message."""
    return torch.cat([x[part].reshape(-1) for x in (k, v) for part in rows])


def _unpack(message: Tensor, rows: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A message of `rows` rows -> (k, v) of the other process, shaped as those here."""
    keys, values = message.split((rows * k[0].numel(), rows * v[0].numel()))
    return keys.view(rows, *k.shape[1:]), values.view(rows, *v.shape[1:])


@dataclass
class _Transfer:
    """A message on its way out, and one on its way in with `rows` rows."""

    works: list[dist.Work]
    outgoing: Tensor | None
    incoming: Tensor | None
    rows: int

    def wait(self) -> Tensor | None:
        for work in self.works:
            work.wait()
        return self.incoming


def _transfer(
    outgoing: Tensor | None, to: int, rows: int, source: int, k: Tensor, v: Tensor, cp: Axis
) -> _Transfer:
    incoming = k.new_empty(rows * (k[0].numel() + v[0].numel())) if rows else None
    return _Transfer(swap(outgoing, to, incoming, source, cp), outgoing, incoming, rows)


def _fetch(plan: Plan, number: int, k: Tensor, v: Tensor, cp: Axis) -> _Transfer | None:
    """Start of the keys' way in round `number` + 1, None after the last."""
    if number == len(plan.rounds):
        return None
    this, step = plan.rounds[number], number + 1
    outgoing = _pack(k, v, this.sends) if this.sends else None
    to, source = (cp.rank + step) % cp.size, (cp.rank - step) % cp.size
    return _transfer(outgoing, to, this.receives, source, k, v, cp)


class _Ring(torch.autograd.Function):
    """q [T, Q, D], k [T, K, D], v [T, K, Dv], sinks [Q] or None -> [T, Q, Dv], T tokens of each process.

    Saved: these, the output, its log-sum-exp [Q, T]. Of others' keys at most two rounds are here at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        plan: Plan,
        cp: Axis,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        total: _Total | None = None
        pending = _fetch(plan, 0, k, v, cp)
        options = {"scale": scale, "softcap": softcap}
        for meeting in plan.own:
            part = block_attention(
                q[meeting.queries], k[meeting.keys], v[meeting.keys], meeting.block, **options
            )
            if total is None:
                total = _Total(*part)
            else:
                total.add(meeting.queries, *part)
        for number, this in enumerate(plan.rounds):
            message = pending.wait()
            pending = _fetch(plan, number + 1, k, v, cp)
            if not this.meetings:
                continue
            keys, values = _unpack(message, this.receives, k, v)
            for meeting in this.meetings:
                rows = meeting.keys
                part = block_attention(q[meeting.queries], keys[rows], values[rows], meeting.block, **options)
                total.add(meeting.queries, *part)
        out, lse = total.out, total.lse
        if sinks is not None:
            out, lse = add_sinks(out, lse, sinks)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.plan, ctx.cp, ctx.options = plan, cp, options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        plan, cp = ctx.plan, ctx.cp
        wide = accumulate_dtype(q.dtype)
        grad_q, grad_k, grad_v = (x.new_zeros(x.shape, dtype=wide) for x in (q, k, v))

        def add(meeting: Meeting, keys: Tensor, values: Tensor, to_keys: Tensor, to_values: Tensor) -> None:
            at, rows = meeting.queries, meeting.keys
            parts = block_attention_backward(
                grad[at], q[at], keys[rows], values[rows], out[at], lse[:, at], meeting.block, **ctx.options
            )
            for whole, where, part in zip((grad_q, to_keys, to_values), (at, rows, rows), parts, strict=True):
                whole[where] += part

        def settle(number: int, returned: _Transfer) -> None:
            """Adds what the process of round `number` + 1 found for the keys it was sent."""
            message = returned.wait()
            if message is None:
                return
            start = 0
            parts = _unpack(message, returned.rows, k, v)
            for rows in plan.rounds[number].sends:
                stop = start + rows.stop - rows.start
                grad_k[rows] += parts[0][start:stop]
                grad_v[rows] += parts[1][start:stop]
                start = stop

        pending, returned = _fetch(plan, 0, k, v, cp), None
        for meeting in plan.own:
            add(meeting, k, v, grad_k, grad_v)
        for number, this in enumerate(plan.rounds):
            message = pending.wait()
            pending = _fetch(plan, number + 1, k, v, cp)
            found = None
            if this.meetings:
                keys, values = _unpack(message, this.receives, k, v)
                sums = [x.new_zeros(x.shape, dtype=wide) for x in (keys, values)]
                for meeting in this.meetings:
                    add(meeting, keys, values, *sums)
                found = torch.cat([x.to(k.dtype).view(-1) for x in sums])
            if returned is not None:
                settle(number - 1, returned)
            back, ahead = (cp.rank - number - 1) % cp.size, (cp.rank + number + 1) % cp.size
            returned = _transfer(found, back, this.sent, ahead, k, v, cp)
        if returned is not None:
            settle(len(plan.rounds) - 1, returned)
        grad_sinks = None if sinks is None else sinks_gradient(grad, out, lse, sinks)
        grads = (whole.to(x.dtype) for whole, x in zip((grad_q, grad_k, grad_v), (q, k, v), strict=True))
        return *grads, grad_sinks, None, None, None, None


class _Total:
    """The softmax over the keys so far: `out` [T, Q, Dv] and `lse` [Q, T], both fp32."""

    def __init__(self, out: Tensor, lse: Tensor) -> None:
        self.out, self.lse = out.to(lse.dtype), lse

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Joins what queries `rows` found at further keys."""
        before = self.lse[:, rows]
        total = torch.logaddexp(before, lse)
        old, new = (torch.exp(part - total).t()[..., None] for part in (before, lse))
        self.out[rows] = self.out[rows] * old + out * new
        self.lse[:, rows] = total


def ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    cp: Axis,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention over the whole stream for the tokens that are here; see `context.attention`."""
    if cp.group not in _MET:
        # NCCL connects a group in its first call, and that one all of its processes must make.
        sum_(q.new_zeros(1), cp)
        _MET.add(cp.group)
    return _Ring.apply(q, k, v, sinks, plan_of(segments, cp.rank, cp.size, window), cp, scale, softcap)
