"""Which parts of a global tensor processes hold: boxes of any number of dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from megatune.parallel.shard import Box, Parts


def whole_box(shape: Sequence[int]) -> Box:
    """All elements of a tensor of this shape."""
    return Box((0,) * len(shape), tuple(shape))


def whole_parts(tensor: Tensor, *, writes: bool = True) -> Parts:
    """`Parts` of a tensor that this process holds whole."""
    return Parts(tuple(tensor.shape), ((whole_box(tensor.shape), tensor.detach()),), writes)


def within(box: Box, outer: Box) -> Box:
    """The place of `box` in a tensor that holds just the elements of `outer`."""
    return Box(tuple(a - b for a, b in zip(box.offset, outer.offset, strict=True)), box.shape)


def hull(boxes: Iterable[Box]) -> Box:
    """The smallest box around some boxes."""
    ends = [(box.offset, tuple(map(sum, zip(box.offset, box.shape, strict=True)))) for box in boxes]
    offset = tuple(map(min, zip(*(first for first, _ in ends), strict=True)))
    stop = tuple(map(max, zip(*(last for _, last in ends), strict=True)))
    return Box(offset, tuple(b - a for a, b in zip(offset, stop, strict=True)))


def tile_exactly(boxes: Sequence[Box], shape: tuple[int, ...]) -> bool:
    """Whether the boxes cover every element of a tensor of this shape once (empty boxes count for nothing)."""
    boxes = [box for box in boxes if box.numel]
    if sum(box.numel for box in boxes) != math.prod(shape):
        return False
    if any(o < 0 or o + n > s for box in boxes for o, n, s in zip(box.offset, box.shape, shape, strict=True)):
        return False
    return not _any_overlap(boxes, 0)


def _any_overlap(boxes: list[Box], dim: int) -> bool:
    """Whether boxes that share rows in the dimensions before `dim` share elements. Sweeps along `dim`: only those that
    reach into the same rows are compared, in the next dimension, so that the pieces of thousands of processes, each of
    which is cut along few dimensions, take linear time."""
    if len(boxes) < 2:
        return False
    if dim == len(boxes[0].shape):
        return True
    starting: dict[int, list[Box]] = {}
    for box in boxes:
        starting.setdefault(box.offset[dim], []).append(box)
    if len(starting) == 1 and len({box.shape[dim] for box in boxes}) == 1:
        return _any_overlap(boxes, dim + 1)
    reaching: list[Box] = []
    for start in sorted(starting):
        reaching = [box for box in reaching if box.offset[dim] + box.shape[dim] > start] + starting[start]
        if _any_overlap(reaching, dim + 1):
            return True
    return False
