"""Context parallelism: one stream of tokens over several processes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatune.ops import Segments, Targets


@dataclass(frozen=True)
class MicroBatch:
    """What a process computes of one micro-batch: `tokens` int64 [T], the documents they belong to, and those of them
    that are scored."""

    tokens: Tensor
    segments: Segments
    targets: Targets
