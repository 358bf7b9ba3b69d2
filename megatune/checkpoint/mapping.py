"""How one of our tensors is made of Hugging Face tensors: a permutation of rows, read and written by parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from megatune.checkpoint.sources import TensorSource
from megatune.errors import CheckpointError
from megatune.models.families.base import Piece
from megatune.parallel.shard import Box, Fused


@dataclass(frozen=True)
class Mapped:
    """One of our tensors in a Hugging Face checkpoint: its global `shape`, the order of its rows where it is `fused`,
    and the `pieces` it is made of (see `Piece`). Rows are dimension 0, or 1 of a tensor that is stacked over experts.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    fused: Fused | None = None

    @property
    def stacked(self) -> bool:
        """Whether dimension 0 counts experts."""
        return len(self.shape) == 3 or self._per_expert

    @property
    def _per_expert(self) -> bool:
        return self.pieces[0].expert is not None

    @property
    def _in_parts(self) -> bool:
        return self.fused is not None and self.pieces[0].part is not None

    @property
    def _group_rows(self) -> int:
        return self.fused.group_rows if self._in_parts else 1

    @property
    def group_rows(self) -> int:
        """How many of dimension 0 are read together: a group of a fused tensor, else one row or one expert."""
        return 1 if self.stacked else self._group_rows

    @cached_property
    def _by_expert(self) -> dict[int | None, list[Piece]]:
        found: dict[int | None, list[Piece]] = {}
        for piece in self.pieces:
            found.setdefault(piece.expert, []).append(piece)
        return found

    def _places(self, expert: int | None = None) -> Iterator[tuple[Piece, int, int]]:
        """(piece, its first row in a group, its rows in a group), of one expert where each has its own pieces."""
        pieces = self._by_expert[expert if self._per_expert else None]
        if not self._in_parts:
            yield pieces[0], 0, 1
            return
        offsets = {name: (start, rows) for name, start, rows in self.fused.offsets()}
        for piece in pieces:
            yield piece, *offsets[piece.part]

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes in the file of the Hugging Face tensors that this one is made of."""
        lead, inner = (self.shape[:1], self.shape[1:]) if self.stacked else ((), self.shape)
        groups = inner[0] // self._group_rows
        shapes: dict[str, tuple[int, ...]] = {}
        for expert in self._by_expert:
            ends: dict[str, int] = {}
            for piece, _, rows in self._places(expert):
                ends[piece.hf_name] = max(ends.get(piece.hf_name, 0), piece.first_row + groups * rows)
            for name, rows in ends.items():
                shape = (rows, *inner[1:])
                shape = tuple(reversed(shape)) if self.pieces[0].transpose else shape
                shapes[name] = shape if self._per_expert else (*lead, *shape)
        return shapes

    def read(self, source: TensorSource, start: int, stop: int) -> Tensor:
        """[start, stop) of dimension 0 of our tensor, in the file's dtype."""
        inner = self.shape[1:]
        return self.read_box(source, Box((start, *(0 for _ in inner)), (stop - start, *inner)))

    def read_box(self, source: TensorSource, box: Box) -> Tensor:
        """The elements `box` of our tensor, in the file's dtype. Reads the groups of rows that cover them; of a tensor
        that is stacked in the file, the experts that they belong to, one at a time."""
        if not self.stacked:
            return self._read_matrix(source, None, box)
        first, inner = box.offset[0], Box(box.offset[1:], box.shape[1:])
        out: Tensor | None = None
        for number in range(box.shape[0]):
            block = self._read_matrix(source, first + number, inner)
            if out is None:
                out = block.new_empty(box.shape)
            out[number] = block
        if out is None:
            raise ValueError(f"read_box: {box} is empty")
        return out

    def _read_matrix(self, source: TensorSource, expert: int | None, box: Box) -> Tensor:
        """`box` of our tensor, or of one expert of a stacked one."""
        index = None if self._per_expert else expert
        places = list(self._places(expert))
        if not self._in_parts:
            piece = places[0][0]
            moved = Box((piece.first_row + box.offset[0], *box.offset[1:]), box.shape)
            return _hf_box(source, piece, index, moved)
        size, start, length = self.fused.group_rows, box.offset[0], box.shape[0]
        first, last = start // size, -(-(start + length) // size)
        buffer: Tensor | None = None
        for piece, offset, rows in places:
            place = (piece.first_row + first * rows, *box.offset[1:])
            block = _hf_box(source, piece, index, Box(place, ((last - first) * rows, *box.shape[1:])))
            if buffer is None:
                buffer = block.new_empty(last - first, size, *box.shape[1:])
            buffer[:, offset : offset + rows] = block.reshape(last - first, rows, *box.shape[1:])
        return buffer.flatten(0, 1).narrow(0, start - first * size, length)

    def boxes(self) -> Iterator[Box]:
        """The parts of our tensor that whole Hugging Face tensors are made of: itself, or each expert."""
        inner = self.shape[1:]
        if not self._per_expert:
            yield Box((0,) * len(self.shape), self.shape)
            return
        for expert in range(self.shape[0]):
            yield Box((expert, *(0 for _ in inner)), (1, *inner))

    def split(self, tensor: Tensor, box: Box | None = None) -> Iterator[tuple[str, Tensor]]:
        """Our whole tensor, or the one of its `boxes` -> (Hugging Face name, tensor as in the file), contiguous."""
        if not self._per_expert:
            yield from self._split(None, tensor, int(self.stacked))
            return
        first = 0 if box is None else box.offset[0]
        for number, matrix in enumerate(tensor):
            yield from self._split(first + number, matrix, 0)

    def _split(self, expert: int | None, tensor: Tensor, dim: int) -> Iterator[tuple[str, Tensor]]:
        grouped = tensor.unflatten(dim, (-1, self._group_rows))
        blocks: dict[str, list[tuple[int, Tensor]]] = {}
        for piece, offset, rows in self._places(expert):
            block = grouped.narrow(dim + 1, offset, rows).flatten(dim, dim + 1)
            blocks.setdefault(piece.hf_name, []).append((piece.first_row, block))
        for name, found in blocks.items():
            found.sort(key=lambda item: item[0])
            whole = found[0][1] if len(found) == 1 else torch.cat([block for _, block in found], dim)
            yield name, (whole.transpose(-1, -2) if self.pieces[0].transpose else whole).contiguous()


def _hf_box(source: TensorSource, piece: Piece, index: int | None, box: Box) -> Tensor:
    """`box` of a Hugging Face tensor, in our order of dimensions, or of its part `index` along dimension 0."""
    if index is not None:
        whole = source.rows(piece.hf_name, index, index + 1)[0]
        return box.of(whole.T if piece.transpose else whole)
    # Slices are of the file's dimension 0, which are our columns where it is transposed.
    by = 1 if piece.transpose else 0
    start, length = box.offset[by], box.shape[by]
    block = source.rows(piece.hf_name, start, start + length)
    block = block.T if piece.transpose else block
    return Box((*box.offset[:by], 0, *box.offset[by + 1 :]), box.shape).of(block)


def check_source(
    source: TensorSource, mapped: Iterable[Mapped], known: set[str], ignored: tuple[str, ...] = ()
) -> None:
    """Raise CheckpointError where `source` lacks a tensor of `mapped`, has one of another shape, a quantised one, or
    one that is not in `known` (all names of the model; `ignored`: endings of names that do not matter)."""
    names = source.names()
    shapes = {name: shape for item in mapped for name, shape in item.hf_shapes().items()}
    missing = sorted(set(shapes) - names)
    if missing:
        raise CheckpointError(
            f"{source}: {len(missing)} of {len(shapes)} tensors are missing, the first is {missing[0]}; is it complete "
            "and does its config belong to it?"
        )
    for name, shape in shapes.items():
        if source.shape(name) != shape:
            raise CheckpointError(
                f"{source}: {name} has shape {list(source.shape(name))} but the config asks for {list(shape)}; they do "
                "not belong together"
            )
        dtype = source.dtype(name)
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise CheckpointError(
                f"{source}: {name} is quantised ({str(dtype).removeprefix('torch.')}); use the bf16 or fp32 weights"
            )
    unknown = sorted(name for name in names - known if not name.endswith(ignored))
    if unknown:
        raise CheckpointError(
            f"{source}: {len(unknown)} tensors do not belong to this model, the first is {unknown[0]}; loading without "
            "them would change the model"
        )


def strip_prefix(mapped: Mapping[str, Mapped], prefix: str) -> dict[str, Mapped]:
    """The same with `prefix` taken off the Hugging Face names (files saved from the model without its head)."""
    return {
        name: Mapped(
            item.shape,
            tuple(replace(piece, hf_name=piece.hf_name.removeprefix(prefix)) for piece in item.pieces),
            item.fused,
        )
        for name, item in mapped.items()
    }
