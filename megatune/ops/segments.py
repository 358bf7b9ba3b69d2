"""Documents in a flat stream of tokens, and which of its positions are scored.

Inside the model there is no batch dimension: a micro-batch is one stream of packed documents. Attention never
crosses a document's border, positions restart at 0 in each document. Padding, where there is any, is a document of
its own at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Borders of the documents in a stream of T tokens.

    `positions`: int64 [T], position of each token in its document. `cu_seqlens`: int32 [documents + 1], cumulative
    lengths starting at 0, on the device. `lengths`: the same borders on the host, so that nothing has to wait for
    the device. `max_seqlen`: the longest length, 0 for an empty stream. `padding`: tokens at the end of the stream
    that are there for the sake of its length. `key`: names the micro-batch for keyed dropout.

    Under context parallelism a process holds some of the stream's tokens: `rows`, int64 [T], says which of the whole
    stream (None: all of it), and `positions` is of these; `cu_seqlens`, `lengths`, `max_seqlen` and `padding` stay
    those of the whole stream.
    """

    positions: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    max_seqlen: int
    padding: int = 0
    key: int = 0
    rows: Tensor | None = None

    @classmethod
    def from_lengths(cls, lengths: Iterable[int], device: torch.device | str | None = None) -> Segments:
        """Segments of documents with these lengths, one after the other. ValueError for a length below 1."""
        lengths = tuple(int(length) for length in lengths)
        if lengths and min(lengths) < 1:
            raise ValueError(f"Segments: document lengths must be at least 1, got {min(lengths)}")
        sizes = torch.tensor(lengths, dtype=torch.int64)
        ends = torch.cumsum(sizes, 0)
        total = sum(lengths)
        positions = torch.arange(total) - torch.repeat_interleave(ends - sizes, sizes, output_size=total)
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        cu_seqlens[1:] = ends
        segments = cls(positions, cu_seqlens, lengths, max(lengths, default=0))
        return segments if device is None else segments.to(device)

    @property
    def tokens(self) -> int:
        """T, the number of tokens that are here."""
        return self.positions.shape[0]

    @property
    def total(self) -> int:
        """Tokens in the whole stream."""
        return sum(self.lengths)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        """The same borders with the tensors on `device`."""
        return replace(
            self,
            positions=self.positions.to(device, non_blocking=non_blocking),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking),
            rows=None if self.rows is None else self.rows.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True, eq=False)
class Targets:
    """Scored positions of a stream.

    `index`: int64 [S], positions in the stream whose output is scored. `labels`: int64 [S], the token that should
    come next there, always in the same document. Labels are already shifted.
    """

    index: Tensor
    labels: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        """The same targets with the tensors on `device`."""
        return Targets(
            self.index.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
        )
