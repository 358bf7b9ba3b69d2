"""Tensors of a megatune checkpoint, by our names and by Hugging Face's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatune.checkpoint.boxes import within
from megatune.checkpoint.manifest import Chunk, Manifest
from megatune.checkpoint.mapping import Mapped
from megatune.checkpoint.reader import ShardFile
from megatune.checkpoint.sources import TensorSource
from megatune.errors import CheckpointError
from megatune.parallel.shard import Box

# What is read of one of our tensors at once; the Hugging Face tensors in it are handed out from there.
WINDOW_BYTES = 32 << 20


class StepTensors:
    """A `TensorSource` of the tensors `prefix...` of one step folder, by our names. Every byte is verified."""

    def __init__(self, folder: Path, manifest: Manifest, prefix: str) -> None:
        self._folder, self._manifest, self._prefix = folder, manifest, prefix
        self._files: dict[str, ShardFile] = {}
        self._keys: dict[str, list[str]] = {}
        for entry in manifest.tensors.values():
            for chunk in entry.chunks:
                self._keys.setdefault(chunk.file, []).append(chunk.key)

    def __str__(self) -> str:
        return str(self._folder)

    def names(self) -> set[str]:
        return {
            name.removeprefix(self._prefix)
            for name in self._manifest.tensors
            if name.startswith(self._prefix)
        }

    def shape(self, name: str) -> tuple[int, ...]:
        return self._manifest.tensors[self._prefix + name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._manifest.tensors[self._prefix + name].dtype

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        rest = self.shape(name)[1:]
        return self.box(name, Box((start, *(0 for _ in rest)), (stop - start, *rest)))

    def box(self, name: str, box: Box) -> Tensor:
        """These elements of a tensor."""
        entry = self._manifest.tensors[self._prefix + name]
        out = torch.empty(box.shape, dtype=entry.dtype)
        filled = 0
        for chunk in entry.chunks:
            common = box & chunk.box
            if common is not None:
                self._file(chunk).fill(within(common, box).of(out), chunk, common)
                filled += common.numel
        if filled != box.numel:
            raise CheckpointError(
                f"{self._folder}: {name} is not covered by its chunks; the checkpoint is damaged"
            )
        return out

    def _file(self, chunk: Chunk) -> ShardFile:
        if chunk.file not in self._files:
            entry, keys = self._manifest.files[chunk.file], self._keys[chunk.file]
            self._files[chunk.file] = ShardFile(self._folder / chunk.file, entry, keys)
        return self._files[chunk.file]


@dataclass(frozen=True)
class _Part:
    """A Hugging Face tensor in one of ours: `expert`, where each has its own; `group_rows`: its rows in one group of
    ours, 0 where only the whole of ours gives it."""

    ours: str
    mapped: Mapped
    expert: int | None
    group_rows: int
    shape: tuple[int, ...]


class HfView:
    """A `TensorSource` of Hugging Face tensors that are made of ours: `mapped` by our name. Ours are read in windows of
    whole groups; the last one is kept, so that reading kin side by side reads every byte once."""

    def __init__(self, source: StepTensors, mapped: Mapping[str, Mapped]) -> None:
        self._source = source
        self._parts: dict[str, _Part] = {}
        for ours, item in mapped.items():
            for name, part in _parts(ours, item):
                if name in self._parts:
                    raise ValueError(f"{name} is in two tensors, {self._parts[name].ours} and {ours}")
                self._parts[name] = part
        self._window: tuple[str, int | None, int, int] | None = None
        self._values: dict[str, Tensor] = {}

    def __str__(self) -> str:
        return str(self._source)

    def names(self) -> set[str]:
        return set(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._parts[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._parts[name].ours)

    def kin(self, name: str) -> str:
        part = self._parts[name]
        return part.ours if part.expert is None else f"{part.ours}#{part.expert}"

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        part = self._parts[name]
        if part.expert is not None:
            return self._read(part, part.expert, part.expert + 1)[name][start:stop]
        size = part.mapped.shape[0]
        if not part.group_rows:
            return self._read(part, 0, size)[name][start:stop]
        ours = part.mapped.group_rows
        row = math.prod(part.mapped.shape[1:]) * self.dtype(name).itemsize
        step = max(1, WINDOW_BYTES // (row * ours))  # groups in a window
        first, pieces = start, []
        while first < stop:
            window = first // part.group_rows // step
            begin, end = window * step, min((window + 1) * step, size // ours)
            values = self._read(part, begin * ours, end * ours)[name]
            until = min(stop, end * part.group_rows)
            pieces.append(values[first - begin * part.group_rows : until - begin * part.group_rows])
            first = until
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _read(self, part: _Part, start: int, stop: int) -> dict[str, Tensor]:
        """The Hugging Face tensors in rows (or experts) [start, stop) of ours."""
        key = (part.ours, part.expert, start, stop)
        if key != self._window:
            self._values, self._window = {}, None
            rest = part.mapped.shape[1:]
            box = Box((start, *(0 for _ in rest)), (stop - start, *rest))
            values = self._source.box(part.ours, box)
            self._values, self._window = dict(part.mapped.split(values, box)), key
        return self._values


def _parts(ours: str, item: Mapped) -> list[tuple[str, _Part]]:
    found = []
    shapes = item.hf_shapes()
    for name, shape in shapes.items():
        pieces = [piece for piece in item.pieces if piece.hf_name == name]
        expert = pieces[0].expert
        rows = 0
        plain = type(item) is Mapped and not item.stacked and not pieces[0].transpose and len(pieces) == 1
        if plain and pieces[0].first_row == 0:
            fused = item.fused if pieces[0].part is not None else None
            rows = 1 if fused is None else fused.part_rows(pieces[0].part)
        elif type(item) is Mapped and item.stacked and expert is None:
            rows = 1  # our dimension 0 and the file's count the same experts
        found.append((name, _Part(ours, item, expert, rows, shape)))
    return found


class Fallback:
    """A `TensorSource`: the tensors of `first`, and of `second` those that it lacks (`names`), in its own dtypes."""

    def __init__(self, first: TensorSource, second: TensorSource, names: set[str]) -> None:
        self._first, self._second, self._others = first, second, names

    def __str__(self) -> str:
        return str(self._first)

    def names(self) -> set[str]:
        return self._first.names() | self._others

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._of(name).dtype(name)

    def kin(self, name: str) -> str:
        own = getattr(self._of(name), "kin", None)
        return name if own is None else own(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._of(name).rows(name, start, stop)

    def _of(self, name: str) -> TensorSource:
        return self._second if name in self._others else self._first
