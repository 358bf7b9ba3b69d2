"""From the files of a model into the parts of it that a process holds."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from megatune.checkpoint.boxes import hull, within
from megatune.checkpoint.mapping import Mapped
from megatune.checkpoint.sources import TensorSource
from megatune.parallel.shard import Box, Parts

# Files are read in portions of about this size, so that host memory does not grow with the largest tensor.
PORTION_BYTES = 64 << 20


@torch.no_grad()
def fill(name: str, parts: Parts, mapped: Mapped, source: TensorSource) -> None:
    """Read what `parts` are of `mapped` from `source`, cast to the dtypes that they have.

    In portions of about PORTION_BYTES: each covers all parts in its rows, so that no row is read twice where a process
    holds several pieces of it. Of the columns that are read and not kept nothing remains.
    """
    if parts.shape != mapped.shape:
        raise ValueError(f"{name}: its parts are of a tensor {parts.shape}, the files have {mapped.shape}")
    size = mapped.group_rows
    row_bytes = math.prod(mapped.shape[1:]) * source.dtype(mapped.pieces[0].hf_name).itemsize
    portion = max(1, PORTION_BYTES // (row_bytes * size)) * size
    if mapped.pieces[0].transpose and not mapped.stacked:
        portion = mapped.shape[0]  # our rows are the file's columns: every portion would read all of it
    for first, last in _spans(parts, size):
        for start in range(first, last, portion):
            stop = min(last, start + portion)
            window = Box((start, *(0 for _ in mapped.shape[1:])), (stop - start, *mapped.shape[1:]))
            found = [(common, box, view) for box, view in parts.parts if (common := box & window) is not None]
            around = hull(common for common, _, _ in found)
            values = mapped.read_box(source, around)
            for common, box, view in found:
                within(common, box).of(view).copy_(within(common, around).of(values))


def _spans(parts: Parts, size: int) -> Iterator[tuple[int, int]]:
    """[first, last) of dimension 0, at borders of groups of `size`, that together cover the parts and nothing twice."""
    ends = sorted(
        (box.offset[0] // size * size, -(-(box.offset[0] + box.shape[0]) // size) * size)
        for box, _ in parts.parts
    )
    current: tuple[int, int] | None = None
    for first, last in ends:
        if current is None or first > current[1]:
            if current is not None:
                yield current
            current = (first, last)
        else:
            current = (current[0], max(current[1], last))
    if current is not None:
        yield current
