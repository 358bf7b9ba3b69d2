"""What each parameter is globally, and how a layout slices it.

One global tensor per parameter: a layout (TP, EP, PP, ZeRO) is a slicing of it and nothing else. Fused weights are
ordered so that every contiguous slice along dimension 0 makes sense by itself (`Fused`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Fused:
    """Order of the rows of a weight that joins several matrices along dimension 0.

    The rows are `groups` equal groups; within a group, each part's rows stand one part after the other. For `qkv`
    a group is one KV head with its query heads: parts (("q", q_per_kv * head_dim), ("k", head_dim), ("v", head_dim)),
    groups = kv_heads. For `gate_up` a group is one row of each: parts (("gate", 1), ("up", 1)), groups = mlp_size.

    `parts`: (name, rows of that part in one group), in order.
    """

    parts: tuple[tuple[str, int], ...]
    groups: int

    @property
    def group_rows(self) -> int:
        return sum(rows for _, rows in self.parts)

    @property
    def rows(self) -> int:
        return self.groups * self.group_rows

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.parts)

    def part_rows(self, name: str) -> int:
        """Rows of one part in one group."""
        return dict(self.parts)[name]

    def offsets(self) -> Iterator[tuple[str, int, int]]:
        """(name, first row within a group, rows) for each part."""
        start = 0
        for name, rows in self.parts:
            yield name, start, rows
            start += rows

    def can_split(self, parts: int) -> bool:
        """Whether `slice` works for that many processes."""
        if self.groups % parts == 0:
            return True
        return parts % self.groups == 0 and all(rows % (parts // self.groups) == 0 for _, rows in self.parts)

    def slice(self, index: int, parts: int) -> tuple[Fused, list[tuple[int, int]]]:
        """Process `index` of `parts`: the order of its rows, and which they are: (first row, rows) runs, in order.

        With at least as many groups as processes: whole groups. With fewer (GQA with fewer KV heads than tensor
        parallel processes): an equal slice of each part of one group, so that no row is held twice.
        """
        if self.groups % parts == 0:
            groups = self.groups // parts
            return Fused(self.parts, groups), [(index * groups * self.group_rows, groups * self.group_rows)]
        share = parts // self.groups
        group, place = divmod(index, share)
        runs = [
            (group * self.group_rows + start + place * (rows // share), rows // share)
            for _, start, rows in self.offsets()
        ]
        return Fused(tuple((name, rows // share) for name, rows in self.parts), 1), runs


@dataclass(frozen=True)
class Box:
    """A part of a tensor: elements offset[d] <= index[d] < offset[d] + shape[d] in each dimension d."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def __and__(self, other: Box) -> Box | None:
        """The elements in both, or None."""
        first = tuple(map(max, self.offset, other.offset))
        last = [
            min(a + n, b + m)
            for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        ]
        shape = tuple(stop - start for start, stop in zip(first, last, strict=True))
        return Box(first, shape) if all(n > 0 for n in shape) else None

    def of(self, tensor: Tensor) -> Tensor:
        """The view of these elements."""
        for dim, (start, length) in enumerate(zip(self.offset, self.shape, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        return tensor


@dataclass(frozen=True)
class ShardSpec:
    """One parameter, globally.

    `name`: global name, the same under every layout. `shape`: global shape. `tensor_dim`: which dimension tensor
    parallelism cuts (None: replicated). `fused`: order of the rows where the weight joins several matrices.
    `partial`: under tensor parallelism each process's gradient of this replicated parameter is a partial sum.
    `vocab`: dimension 0 counts the vocabulary, and is cut unevenly where it has to be. `expert`: dimension 0 counts
    experts and is cut by expert parallelism, and `tensor_dim` is cut by expert tensor parallelism.
    """

    name: str
    shape: tuple[int, ...]
    tensor_dim: int | None = None
    fused: Fused | None = None
    partial: bool = False
    vocab: bool = False
    expert: bool = False


@dataclass(frozen=True)
class Cut:
    """Which slice of the tensor and expert parallel cuts a process holds: `rank` of `size` each; of `World` this is
    (tp, ep, etp)."""

    tp: tuple[int, int] = (0, 1)
    ep: tuple[int, int] = (0, 1)
    etp: tuple[int, int] = (0, 1)


def vocab_rows(rows: int, rank: int, size: int) -> tuple[int, int]:
    """(first row, rows) of a vocabulary that process `rank` of `size` holds. All but the last of those that hold some
    have the same number, a multiple of 64 where the vocabulary is large enough that none goes empty."""
    share = -(-rows // size)
    if rows >= 64 * size * size:
        share = -(-share // 64) * 64
    start = min(rank * share, rows)
    return start, min(share, rows - start)


def local_boxes(spec: ShardSpec, cut: Cut) -> tuple[Box, ...]:
    """The parts of the global tensor that a process holds; joined along `tensor_dim` in this order they are its local
    tensor."""
    offset, shape = [0] * len(spec.shape), list(spec.shape)
    if spec.expert:
        rank, size = cut.ep
        shape[0] //= size
        offset[0] = rank * shape[0]
    rank, size = cut.etp if spec.expert else cut.tp
    dim = spec.tensor_dim
    if dim is None or size == 1:
        return (Box(tuple(offset), tuple(shape)),)
    if spec.vocab:
        runs = [vocab_rows(spec.shape[0], rank, size)]
    elif spec.fused is not None:
        runs = spec.fused.slice(rank, size)[1]
    else:
        share = spec.shape[dim] // size
        runs = [(rank * share, share)]
    boxes = []
    for start, length in runs:
        offset[dim], shape[dim] = start, length
        boxes.append(Box(tuple(offset), tuple(shape)))
    return tuple(boxes)


def local_shape(spec: ShardSpec, cut: Cut) -> tuple[int, ...]:
    """Shape of a process's local tensor."""
    boxes = local_boxes(spec, cut)
    shape = list(boxes[0].shape)
    if spec.tensor_dim is not None:
        shape[spec.tensor_dim] = sum(box.shape[spec.tensor_dim] for box in boxes)
    return tuple(shape)


@dataclass(frozen=True, eq=False)
class Parts:
    """A global tensor as far as this process holds it: what checkpoints save and load.

    `shape`: the global one. `parts`: (which elements, the tensor of just these: a view of the live one, so that filling
    it fills the parameter); may be empty. `writes`: of the processes that hold the same parts, this one saves them.
    """

    shape: tuple[int, ...]
    parts: tuple[tuple[Box, Tensor], ...]
    writes: bool


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The elements [start, stop) of a tensor in row-major order, as boxes, in order. At most 2 * dimensions - 1."""
    if start >= stop:
        return []
    if len(shape) == 1:
        return [Box((start,), (stop - start,))]
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner
    if first > last:  # within one row
        row = start // inner
        return _at(row, flat_boxes(shape[1:], start - row * inner, stop - row * inner))
    boxes = []
    if start < first * inner:
        boxes += _at(first - 1, flat_boxes(shape[1:], start - (first - 1) * inner, inner))
    if first < last:
        boxes.append(Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    if last * inner < stop:
        boxes += _at(last, flat_boxes(shape[1:], 0, stop - last * inner))
    return boxes


def _at(row: int, boxes: list[Box]) -> list[Box]:
    return [Box((row, *box.offset), (1, *box.shape)) for box in boxes]


def global_boxes(local: Box, spec: ShardSpec, cut: Cut) -> list[tuple[Box, Box]]:
    """A box of the local tensor -> its parts as (box of the global tensor, box of the local tensor)."""
    found, start = [], 0
    dim = spec.tensor_dim
    for held in local_boxes(spec, cut):
        place = [0] * len(held.shape)
        if dim is not None:
            place[dim] = start
            start += held.shape[dim]
        part = local & Box(tuple(place), held.shape)
        if part is not None:
            offset = tuple(p - q + o for p, q, o in zip(part.offset, place, held.offset, strict=True))
            found.append((Box(offset, part.shape), part))
    return found


def parts_of_local(
    spec: ShardSpec, cut: Cut, tensor: Tensor, writes: bool, *, at: Box | None = None
) -> Parts:
    """`Parts` of a local tensor, or of the elements `at` of it that `tensor` holds in their shape."""
    at = at or Box((0,) * tensor.ndim, tuple(tensor.shape))
    if not at.numel:
        return Parts(spec.shape, (), writes)
    parts = []
    for where, part in global_boxes(at, spec, cut):
        inside = Box(tuple(a - b for a, b in zip(part.offset, at.offset, strict=True)), part.shape)
        parts.append((where, inside.of(tensor)))
    return Parts(spec.shape, tuple(parts), writes)


def parts_of_flat(spec: ShardSpec, cut: Cut, flat: Tensor, start: int, writes: bool) -> Parts:
    """`Parts` of elements [start, start + len(flat)) of the flattened local tensor, which `flat` holds (longer flats
    than the local tensor are padded: the rest is left out)."""
    shape = local_shape(spec, cut)
    stop = min(start + flat.shape[0], math.prod(shape))
    parts: list[tuple[Box, Tensor]] = []
    done = 0
    for box in flat_boxes(shape, start, stop):
        view = flat[done : done + box.numel].view(box.shape)
        done += box.numel
        parts.extend(parts_of_local(spec, cut, view, writes, at=box).parts)
    return Parts(spec.shape, tuple(parts), writes)
