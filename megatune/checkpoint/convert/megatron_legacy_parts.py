"""Parts of one tensor in the rank files of a legacy Megatron checkpoint: found, joined, compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from megatune.checkpoint.convert.megatron_legacy_files import RankFile
from megatune.checkpoint.convert.megatron_names import MegatronTensor
from megatune.checkpoint.convert.pickles import LazyTensor
from megatune.checkpoint.sources import TensorSource
from megatune.errors import CheckpointError

_COMPARED_WHOLE, _COMPARED_ROWS = 1 << 16, 64


class StoredTensor(Protocol):
    """A tensor of which rows are read, wherever it stands."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def numel(self) -> int: ...

    def rows(self, start: int, stop: int) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Parts:
    """One tensor's parts in the files, by tensor parallel rank; one part: it is replicated or not cut."""

    tensor: MegatronTensor
    parts: tuple[StoredTensor, ...]
    cut: int | None

    def rows(self, start: int, stop: int) -> Tensor:
        if len(self.parts) == 1:
            return self.parts[0].rows(start, stop)
        if self.cut == 1:
            return torch.cat([part.rows(start, stop) for part in self.parts], 1)
        found = [self.parts[rank].rows(first, last) for rank, first, last in self._runs(start, stop)]
        return torch.cat(found) if found else self.parts[0].rows(0, 0)

    def _runs(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(rank, first row, one past the last row) in the ranks' parts."""
        share = self.parts[0].shape[0] // (2 if self.tensor.halves else 1)
        side_rows = share * len(self.parts)
        runs = []
        while start < stop:
            side, within = divmod(start, side_rows)
            rank, at = divmod(within, share)
            count = min(stop - start, share - at)
            first = side * share + at
            runs.append((rank, first, first + count))
            start += count
        return runs


@dataclass(frozen=True, eq=False)
class Place:
    """Where a part of a tensor stands: `key` of a chunk of a rank's file, or what `view` takes out of it."""

    file: RankFile
    chunk: int
    key: str
    view: Callable[[LazyTensor], LazyTensor] = lambda tensor: tensor

    @property
    def stored(self) -> LazyTensor:
        return self.file.chunks[self.chunk].tensors[self.key]

    def tensor(self) -> LazyTensor:
        return self.view(self.stored)


class StateParts:
    """One slot of the optimizer's states, in the shapes of the weights, fp32: a `TensorSource`."""

    def __init__(self, parts: Mapping[str, Parts], whole: TensorSource) -> None:
        self._parts, self._whole = parts, whole

    def __str__(self) -> str:
        return str(self._whole)

    def names(self) -> set[str]:
        return set(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._whole.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._parts[name].rows(start, stop).float()


def joined(tensor: MegatronTensor, found: list[tuple[RankFile, LazyTensor]]) -> Parts:
    """Parts by rank, their shapes checked against the model's."""
    count = len(found)
    parts = tuple(part for _, part in found)
    for file, part in found:
        if part.shape == tensor.shape and tensor.cut is None:
            continue
        # Latents' projections are replicated, or (without Transformer Engine) cut.
        cut = 0 if tensor.cut is None else tensor.cut
        wanted = list(tensor.shape)
        wanted[cut] = part.shape[0] if tensor.vocab and part.shape else wanted[cut] // count
        divides = tensor.vocab or tensor.shape[cut] % (count * (2 if tensor.halves else 1)) == 0
        if list(part.shape) != wanted or not divides or part.shape != parts[0].shape:
            raise CheckpointError(
                f"{file.path}: {tensor.name} has shape {list(part.shape)} on one of {count} ranks, which does not make "
                f"{list(tensor.shape)}; config and checkpoint do not belong together"
            )
    whole = tensor.cut is None and parts[0].shape == tensor.shape
    if tensor.vocab and parts[0].shape[0] * count < tensor.shape[0]:
        raise CheckpointError(
            f"{found[0][0].path}: {tensor.name} has {parts[0].shape[0] * count} rows for a vocabulary of "
            f"{tensor.shape[0]}; config and checkpoint do not belong together"
        )
    return Parts(tensor, parts[:1] if whole else parts, 0 if tensor.cut is None else tensor.cut)


def samples(tensor: StoredTensor, rows: int = _COMPARED_ROWS) -> list[tuple[int, int]]:
    """Runs of rows (first, one past the last) by which a tensor is compared: all of them, or `rows` of a large one."""
    count = tensor.shape[0]
    if tensor.numel <= _COMPARED_WHOLE:
        return [(0, count)]
    return [(row, row + 1) for row in range(0, count, -(-count // rows))]


def are_equal(parts: Sequence[StoredTensor]) -> bool:
    """Whether replicas are; of large ones by samples of their rows."""
    return all(
        torch.equal(parts[0].rows(first, last), other.rows(first, last))
        for other in parts[1:]
        for first, last in samples(parts[0])
    )


def of_group(
    group: LazyTensor, tensor: MegatronTensor, expert: int, number: int, file: RankFile, ranks: int
) -> LazyTensor:
    """One expert of an old grouped weight: its memory is [experts, in, out], whatever its shape says."""
    outputs, inputs = tensor.shape
    outputs, inputs = (outputs // ranks, inputs) if number == 1 else (outputs, inputs // ranks)
    if group.numel % (outputs * inputs) or (expert + 1) * outputs * inputs > group.numel:
        raise CheckpointError(
            f"{file.path}: mlp.experts.weight{number} has shape {list(group.shape)}, which holds no expert {expert} of "
            f"{outputs} by {inputs}; config and checkpoint do not belong together"
        )
    return replace(
        group,
        shape=(outputs, inputs),
        stride=(1, outputs),
        offset=group.offset + expert * outputs * inputs,
    )
