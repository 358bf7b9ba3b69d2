"""How one of our tensors is made of Hugging Face tensors: a permutation of rows, read and written by slices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatune.checkpoint.boxes import local_part
from megatune.checkpoint.sources import TensorSource
from megatune.errors import CheckpointError
from megatune.models.families.base import Piece
from megatune.parallel.shard import Fused

# Rows are read in portions of about this size, so that host memory does not grow with the largest tensor.
PORTION_BYTES = 64 << 20


@dataclass(frozen=True)
class Mapped:
    """One of our tensors in a Hugging Face checkpoint: its global `shape`, the order of its rows where it is `fused`,
    and the `pieces` it is made of (see `Piece`)."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    fused: Fused | None = None

    @property
    def group_rows(self) -> int:
        """Rows that are read together: a group of a fused tensor, else one row."""
        return self.fused.group_rows if self._in_parts else 1

    @property
    def _in_parts(self) -> bool:
        return self.fused is not None and self.pieces[0].part is not None

    def places(self) -> Iterator[tuple[Piece, int, int]]:
        """(piece, its first row in a group, its rows in a group)."""
        if not self._in_parts:
            yield self.pieces[0], 0, 1
            return
        offsets = {name: (start, rows) for name, start, rows in self.fused.offsets()}
        for piece in self.pieces:
            yield piece, *offsets[piece.part]

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes in the file of the Hugging Face tensors that this one is made of."""
        groups, ends = self.shape[0] // self.group_rows, {}
        for piece, _, rows in self.places():
            ends[piece] = piece.first_row + groups * rows
        shapes: dict[str, tuple[int, ...]] = {}
        for piece in self.pieces:
            rows = max(end for other, end in ends.items() if other.hf_name == piece.hf_name)
            shape = (rows, *self.shape[1:])
            shapes[piece.hf_name] = tuple(reversed(shape)) if piece.transpose else shape
        return shapes

    def read(self, source: TensorSource, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of our tensor in the file's dtype. Reads the groups that cover them, no more."""
        size = self.group_rows
        first, last = start // size, -(-stop // size)
        buffer: Tensor | None = None
        for piece, offset, rows in self.places():
            begin, end = piece.first_row + first * rows, piece.first_row + last * rows
            block = _hf_rows(source, piece, begin, end)
            if rows == size:
                return block[start - first * size : stop - first * size]
            if buffer is None:
                buffer = block.new_empty(last - first, size, *self.shape[1:])
            buffer[:, offset : offset + rows] = block.view(last - first, rows, *self.shape[1:])
        return buffer.flatten(0, 1)[start - first * size : stop - first * size]

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Our whole tensor -> (Hugging Face name, tensor as in the file), contiguous."""
        groups = self.shape[0] // self.group_rows
        grouped = tensor.view(groups, self.group_rows, *self.shape[1:])
        blocks: dict[str, list[tuple[int, Tensor]]] = {}
        transposed = {piece.hf_name: piece.transpose for piece in self.pieces}
        for piece, offset, rows in self.places():
            block = grouped[:, offset : offset + rows].flatten(0, 1)
            blocks.setdefault(piece.hf_name, []).append((piece.first_row, block))
        for name, found in blocks.items():
            found.sort(key=lambda item: item[0])
            whole = found[0][1] if len(found) == 1 else torch.cat([block for _, block in found])
            yield name, (whole.T if transposed[name] else whole).contiguous()


def _hf_rows(source: TensorSource, piece: Piece, start: int, stop: int) -> Tensor:
    if not piece.transpose:
        return source.rows(piece.hf_name, start, stop)
    # Our rows are the file's columns: there is no slice of the file to read, so it is read whole.
    whole = source.rows(piece.hf_name, 0, source.shape(piece.hf_name)[0])
    return whole[:, start:stop].T.contiguous()


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


@torch.no_grad()
def fill(name: str, parameter: Tensor, mapped: Mapped, source: TensorSource) -> None:
    """Read this rank's rows of `parameter` from `source`, in portions of about PORTION_BYTES."""
    part = local_part(name, parameter)
    if part is None or part.box.numel == 0:
        return
    (first, *_), (rows, *_) = part.box.offset, part.box.shape
    others = tuple(slice(o, o + n) for o, n in zip(part.box.offset[1:], part.box.shape[1:], strict=True))
    size = mapped.group_rows
    row_bytes = math.prod(mapped.shape[1:]) * source.dtype(mapped.pieces[0].hf_name).itemsize
    portion = max(1, PORTION_BYTES // (row_bytes * size)) * size
    if mapped.pieces[0].transpose:
        portion = mapped.shape[0]  # the file has no slices to offer: read it once
    start = first
    while start < first + rows:
        # Portions end at borders of groups, so that no group is read twice.
        stop = min(first + rows, start // size * size + portion)
        part.tensor[start - first : stop - first].copy_(
            mapped.read(source, start, stop)[(slice(None), *others)]
        )
        start = stop


def strip_prefix(mapped: Mapping[str, Mapped], prefix: str) -> dict[str, Mapped]:
    """The same with `prefix` taken off the Hugging Face names (files saved from the model without its head)."""
    return {
        name: Mapped(
            item.shape,
            tuple(
                Piece(p.hf_name.removeprefix(prefix), p.part, p.first_row, p.transpose) for p in item.pieces
            ),
            item.fused,
        )
        for name, item in mapped.items()
    }
