"""Which parts of a global tensor processes hold: boxes of any number of dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

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
    # A grid (each dimension cut at the same places everywhere) is proved in linear time.
    cuts = [sorted({(box.offset[d], box.shape[d]) for box in boxes}) for d in range(len(shape))]
    is_grid = all(a + n == b for dim in cuts for (a, n), (b, _) in pairwise(dim))
    if is_grid and len(set(boxes)) == len(boxes) == math.prod(len(dim) for dim in cuts):
        return True
    return not _any_overlap(boxes)


def _any_overlap(boxes: list[Box]) -> bool:
    """Sweeps along the first dimension, so that a box meets only those that share rows with it."""
    if not boxes or not boxes[0].shape:
        return len(boxes) > 1
    reaching: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offset):
        reaching = [other for other in reaching if other.offset[0] + other.shape[0] > box.offset[0]]
        if any(box & other is not None for other in reaching):
            return True
        reaching.append(box)
    return False
