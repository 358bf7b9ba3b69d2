"""Ulysses attention (arXiv:2309.14509): all-to-all from tokens to heads, attention over the whole stream, and back."""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from megatune import ops
from megatune.ops import Segments
from megatune.parallel.collectives import all_to_all
from megatune.parallel.world import Axis

# Made once for a micro-batch and used by all layers.
_WHOLE: WeakKeyDictionary[Segments, Segments] = WeakKeyDictionary()


def _whole(segments: Segments) -> Segments:
    """The segments of the whole stream, from those of a process's part."""
    if segments not in _WHOLE:
        starts, total = segments.cu_seqlens[:-1].long(), segments.total
        lengths = segments.cu_seqlens.diff().long()
        first = torch.repeat_interleave(starts, lengths, output_size=total)
        positions = torch.arange(total, device=first.device) - first
        _WHOLE[segments] = replace(segments, positions=positions, rows=None)
    return _WHOLE[segments]


def _in_order(x: Tensor, size: int) -> Tensor:
    """Rows of the processes, one after the other, two chunks each -> rows of the stream."""
    chunks = x.unflatten(0, (size, 2, -1))
    return torch.cat((chunks[:, 0], chunks[:, 1].flip(0))).flatten(0, 1)


def _by_process(x: Tensor, size: int) -> Tensor:
    """Rows of the stream -> rows of the processes, one after the other."""
    chunks = x.unflatten(0, (2, size, -1))
    return torch.stack((chunks[0], chunks[1].flip(0)), 1).flatten(0, 2)


def ulysses(
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
    """Attention over the whole stream for the tokens that are here; see `context.attention`.

    Process p computes query heads [p * Q / cp, (p + 1) * Q / cp) for all tokens. Fewer key/value heads than processes
    are repeated before they are sent.
    """
    size, tokens, heads = cp.size, q.shape[0], q.shape[1] // cp.size
    if k.shape[1] < size:
        k, v = (x.repeat_interleave(size // k.shape[1], 1) for x in (k, v))
    # [T / cp, processes, heads * (D + ..)]: one message to each process.
    parts = [x.unflatten(1, (size, -1)).flatten(2) for x in (q, k, v)]
    rows = [tokens] * size
    arrived = all_to_all(torch.cat(parts, 2).transpose(0, 1).flatten(0, 1), cp, rows, rows)
    whole = _in_order(arrived, size).split([part.shape[2] for part in parts], 1)
    q, k, v = (part.unflatten(1, (-1, x.shape[2])) for part, x in zip(whole, (q, k, v), strict=True))
    if sinks is not None:
        sinks = sinks.narrow(0, cp.rank * heads, heads)
    out = ops.attention(q, k, v, _whole(segments), scale=scale, window=window, softcap=softcap, sinks=sinks)
    back = all_to_all(_by_process(out.flatten(1), size), cp, rows, rows)
    return back.unflatten(0, (size, tokens)).transpose(0, 1).reshape(tokens, size * heads, -1)
