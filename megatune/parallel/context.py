"""Context parallelism: one stream of tokens over several processes.

The stream is cut into 2 * cp equal chunks; process i holds chunks i and 2 * cp - 1 - i (zigzag), so that under a causal
mask all processes have the same number of scores to compute.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatune import ops
from megatune.errors import ParallelError
from megatune.ops import Segments, Targets
from megatune.ops.attention import check_attention
from megatune.parallel.ring import ring
from megatune.parallel.ulysses import ulysses
from megatune.parallel.world import Axis

Method = Literal["ring", "ulysses"]


@dataclass(frozen=True)
class MicroBatch:
    """What a process computes of one micro-batch: `tokens` int64 [T], the documents they belong to, and those of them
    that are scored."""

    tokens: Tensor
    segments: Segments
    targets: Targets


def shard_stream(tokens: Tensor, segments: Segments, targets: Targets, cp: Axis) -> MicroBatch:
    """This process's part of a stream: tokens int64 [T] -> [T / cp], in the order of its two chunks.

    `segments.positions` and `.rows` are of these tokens, the borders stay those of the whole stream. Of the targets
    (their index ascending) those stay whose position is here; labels come from the whole stream, so the last token of
    a chunk keeps its own. Call it before the stream moves to the GPU: selecting targets waits for their number.
    ValueError where T is no multiple of 2 * cp.
    """
    if cp.size == 1:
        return MicroBatch(tokens, segments, targets)
    total = tokens.shape[0]
    if total % (2 * cp.size) or total != segments.tokens:
        raise ValueError(
            f"shard_stream: {total} tokens and segments of {segments.tokens} must be one multiple of "
            f"{2 * cp.size}, two chunks for each of the {cp.size} context parallel processes"
        )
    chunk = total // (2 * cp.size)
    first, second = cp.rank * chunk, (2 * cp.size - 1 - cp.rank) * chunk
    steps = torch.arange(chunk, device=tokens.device)
    rows = torch.cat((steps + first, steps + second))
    index = targets.index
    in_first = (index >= first) & (index < first + chunk)
    in_second = (index >= second) & (index < second + chunk)
    here = torch.where(in_first, index - first, index - second + chunk)
    kept = in_first | in_second
    return MicroBatch(
        tokens[rows],
        replace(segments, positions=segments.positions[rows], rows=rows),
        Targets(here[kept], targets.labels[kept]),
    )


def check_context(num_heads: int, num_kv_heads: int, tp: int, cp: int, method: Method) -> None:
    """ParallelError where the heads of a model do not fit context parallelism of that size. Needs no processes.

    Ring attention takes any heads. Ulysses gives each process whole heads: those that tensor parallelism leaves must
    divide evenly, fewer key/value heads than processes are repeated.
    """
    if cp == 1 or method == "ring":
        return
    heads, kv_heads = num_heads // tp, max(1, num_kv_heads // tp)
    if heads % cp == 0 and (kv_heads % cp == 0 or cp % kv_heads == 0):
        return
    fitting = [
        size for size in range(1, cp) if heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)
    ]
    raise ParallelError(
        f"parallel.context: {cp} with context_method ulysses does not fit {heads} query and {kv_heads} key/value heads "
        f"(of {num_heads} and {num_kv_heads}, tensor {tp}); use context {' or '.join(map(str, fitting))}, or "
        "context_method ring"
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    cp: Axis,
    *,
    method: Method = "ring",
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_segments: Segments | None = None,
) -> Tensor:
    """`ops.attention` over a stream that is cut over the context parallel processes.

    q [T / cp, Q, D], k [T / cp, K, D], v [T / cp, K, Dv] of the tokens `segments.rows` -> [T / cp, Q, Dv]; `sinks` [Q],
    whose gradient is the part of this process (the sum over cp is the whole). A stream that is not cut
    (`segments.rows` is None, as in generation) is computed here as on one process. `method`: "ring" (`ring.py`; takes
    any heads) or "ulysses" (`ulysses.py`; `check_context` says which). ValueError as in `ops.attention`.
    """
    options = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
    if cp.size == 1 or segments.rows is None:
        return ops.attention(q, k, v, segments, key_segments=key_segments, **options)
    if key_segments is not None:
        raise ValueError(
            "attention: a stream cut over context parallel processes has no cache (key_segments)"
        )
    check_attention(q, k, v, segments, segments, window, softcap, sinks)
    if method == "ulysses":
        check_context(q.shape[1], k.shape[1], 1, cp.size, method)
        return ulysses(q, k, v, segments, cp, **options)
    return ring(q, k, v, segments, cp, **options)
