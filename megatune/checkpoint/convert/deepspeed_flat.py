"""Parameters inside flat vectors that are cut or dealt out over files, read by rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatune.checkpoint.convert.pickles import LazyTensor


@dataclass(frozen=True)
class Flat:
    """One parameter in a vector whose pieces lie in several files.

    Element i of the parameter (row-major) is number `first` + i of the vector, and piece number k holds the elements
    [k * `size`, (k + 1) * `size`) of it, from its own element `base` on.
    """

    shape: tuple[int, ...]
    pieces: Sequence[LazyTensor]
    size: int
    first: int = 0
    base: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def is_there(self) -> bool:
        """Whether the pieces are long enough for it, and of one dtype."""
        last = self.first + self.numel
        for number, piece in enumerate(self.pieces):
            needed = min(self.size, last - number * self.size)
            inside = needed > 0 and (number + 1) * self.size > self.first
            if piece.dtype != self.dtype or (inside and self.base + needed > piece.numel):
                return False
        return len(self.pieces) * self.size >= last

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop), flat."""
        place, end, found = self.first + start, self.first + stop, []
        while place < end:
            number, inside = divmod(place, self.size)
            upto = min(end - number * self.size, self.size)
            found.append(self.pieces[number].flat(self.base + inside, self.base + upto))
            place = number * self.size + upto
        if len(found) == 1:
            return found[0]
        return torch.cat(found) if found else torch.empty(0, dtype=self.dtype)


def whole(tensor: LazyTensor, shape: tuple[int, ...] | None = None) -> Flat:
    """A tensor that lies in one piece; `shape`: where the file has it flat."""
    return Flat(shape or tensor.shape, (tensor,), max(1, tensor.numel))


class FlatSource:
    """A `TensorSource` of such parameters."""

    def __init__(self, place: str, tensors: Mapping[str, Flat]) -> None:
        self._place, self._tensors = place, tensors

    def __str__(self) -> str:
        return self._place

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        flat = self._tensors[name]
        row = math.prod(flat.shape[1:])
        return flat.read(start * row, stop * row).view(stop - start, *flat.shape[1:])
