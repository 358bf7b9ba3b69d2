"""A micro-batch: packed sequences as one flat stream of documents, with what is scored in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatune.data.cache import TokenCache
from megatune.ops.segments import Segments, Targets


@dataclass(frozen=True)
class Batch:
    """`tokens`: int64 [T]. `segments`: borders of the documents. `targets`: positions with loss and their labels; a
    label is always in the same document. `sequence_ids`: numbers of the packed sequences, `sample_ids`: of the
    documents, in the cache. `index`: number of this micro-batch in the global batch, the same under any number of
    processes."""

    tokens: Tensor
    segments: Segments
    targets: Targets
    sequence_ids: tuple[int, ...]
    sample_ids: tuple[int, ...]
    index: int = 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        return Batch(
            self.tokens.to(device, non_blocking=non_blocking),
            self.segments.to(device, non_blocking=non_blocking),
            self.targets.to(device, non_blocking=non_blocking),
            self.sequence_ids,
            self.sample_ids,
            self.index,
        )

    def padded(self, multiple: int) -> Batch:
        """The same batch with T rounded up to a multiple, by one more document (of token 0, nothing of it scored).

        Every new T costs the libraries below a set of kernels made for it, kept for good, and the allocator a set
        of blocks; with a few different T there are few.
        """
        missing = -len(self.tokens) % multiple
        if not missing:
            return self
        return replace(
            self,
            tokens=torch.cat([self.tokens, self.tokens.new_zeros(missing)]),
            segments=replace(
                Segments.from_lengths((*self.segments.lengths, missing), self.tokens.device), padding=missing
            ),
        )


def make_batch(cache: TokenCache, sequences: Sequence[int], index: int = 0) -> Batch:
    """The given packed sequences, one after the other. T is the sum of their lengths: there is no padding."""
    samples = [sample for sequence in sequences for sample in cache.samples_of(sequence)]
    parts = [cache.sample(sample) for sample in samples]
    tokens = np.concatenate([part for part, _ in parts]).astype(np.int64)
    learnt = np.concatenate([mask for _, mask in parts])
    lengths = [len(part) for part, _ in parts]
    # The output at a position is scored against the token after it. A document's first token is never learnt, so no
    # label crosses a border.
    scored = np.flatnonzero(learnt)
    targets = Targets(torch.from_numpy(scored - 1), torch.from_numpy(tokens[scored]))
    return Batch(
        torch.from_numpy(tokens),
        Segments.from_lengths(lengths),
        targets,
        tuple(int(sequence) for sequence in sequences),
        tuple(samples),
        index,
    )


def empty_batch(token: int, index: int = 0) -> Batch:
    """One document of one token and nothing scored: for a process that has no work left while others have."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return Batch(torch.tensor([token]), Segments.from_lengths([1]), Targets(nothing, nothing), (), (), index)
