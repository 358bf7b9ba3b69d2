"""Hugging Face folders: safetensors (one file or shards with an index), old pickled `.bin` files, config, tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatune.checkpoint.convert.base import Format, Job, Line, Opened, Options, copy_extras, kin
from megatune.checkpoint.convert.bin_files import BinFolder
from megatune.checkpoint.convert.digest import PORTION_BYTES, bytes_of
from megatune.checkpoint.convert.disk import ahead, write_at
from megatune.checkpoint.convert.disk import opened as opened_file
from megatune.checkpoint.convert.names import main_dtype, model_map
from megatune.checkpoint.hf import MAX_SHARD_BYTES, write_json
from megatune.checkpoint.quantised import dequantised
from megatune.checkpoint.resolve import ModelFolder, open_folder
from megatune.checkpoint.safetensors_file import header_of
from megatune.checkpoint.sources import INDEX, SINGLE, TensorSource, read_json
from megatune.errors import ConfigError
from megatune.models.registry import family_for

# What one job writes of a file: enough to keep the disk busy, little enough to share a model among processes.
PART_BYTES = 128 << 20


def detect(path: Path) -> bool:
    if not (path / "config.json").is_file():
        return False
    return any((path / name).is_file() for name in (SINGLE, INDEX)) or BinFolder.is_one(path)


def open_hf(path: Path, options: Options) -> Opened:
    """A Hugging Face folder; quantised weights (fp8, mxfp4) as the bf16 numbers that they stand for."""
    if not (path / SINGLE).is_file() and not (path / INDEX).is_file() and BinFolder.is_one(path):
        config = read_json(path / "config.json")
        try:
            family_for(config)
        except ConfigError as error:
            raise ConfigError(f"{path}/{error}") from error
        weights: TensorSource = dequantised(BinFolder(path), config)
    else:
        folder: ModelFolder = open_folder(path, str(path))
        config, weights = folder.hf_config, folder.tensors()
    lines = []
    if config.get("quantization_config"):
        lines = [
            Line(name, "cast", "dequantised")
            for name in sorted(weights.names())
            if weights.dtype(name) == torch.bfloat16
        ]
    return Opened("hf", path, config, weights, extras=path, report=lines)


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes begin in its file."""

    name: str
    offset: int


class HfTarget:
    """A Hugging Face folder being written. Tensors keep their dtypes; several jobs write into one file, each its own
    bytes of it."""

    def __init__(self, opened: Opened, options: Options) -> None:
        self.report: list[Line] = []
        self._opened, self._source = opened, opened.weights
        names = list(self._names(opened))
        self._shards = self._plan(names)
        self._parts: dict[tuple[str, int], list[list[_Place]]] = {}
        self._headers: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        self._jobs: list[Job] = []
        for index, shard in enumerate(self._shards):
            self._lay_out(self._file(index), shard)

    def jobs(self) -> list[Job]:
        return self._jobs

    def make(self, job: Job, folder: Path) -> None:
        with opened_file(folder / job.file, self._sizes[job.file]) as descriptor:
            if job.part == 0:
                write_at(descriptor, memoryview(self._headers[job.file]), 0)
            groups = self._parts[job.file, job.part]
            pieces = (piece for group in groups for piece in self._pieces(group))
            for data, offset in ahead(pieces, lambda piece: len(piece[0])):
                write_at(descriptor, data, offset)

    def _pieces(self, group: list[_Place]) -> Iterator[tuple[memoryview, int]]:
        """(bytes, their place in the file) of tensors that are kin, side by side, in portions."""
        sizes = {place.name: self._bytes(place.name) for place in group}
        steps = max(1, -(-sum(sizes.values()) // PORTION_BYTES))
        for step in range(steps):
            for place in group:
                rows = self._source.shape(place.name)[0]
                start, stop = rows * step // steps, rows * (step + 1) // steps
                if start < stop:
                    data = bytes_of(self._source.rows(place.name, start, stop))
                    yield data, place.offset + start * (sizes[place.name] // rows)

    def finish(self, folder: Path) -> None:
        if len(self._shards) > 1:
            files = {name: self._file(index) for index, shard in enumerate(self._shards) for name in shard}
            total = sum(self._bytes(name) for name in files)
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
        copy_extras(self._opened, folder)
        config = {key: value for key, value in self._opened.hf_config.items() if key != "quantization_config"}
        for key in {"torch_dtype", "dtype"} & config.keys() or {"torch_dtype"}:
            config[key] = str(main_dtype(self._source)).removeprefix("torch.")
        write_json(folder / "config.json", config)

    def _names(self, opened: Opened) -> Iterator[str]:
        """The model's order, wider dtypes first as files align their tensors."""
        _, _, mapped = model_map(opened)
        order = {
            name: number
            for number, name in enumerate(n for item in mapped.values() for n in item.hf_shapes())
        }
        yield from sorted(order, key=lambda name: (-self._source.dtype(name).itemsize, order[name]))

    def _plan(self, names: list[str]) -> list[list[str]]:
        shards: list[list[str]] = [[]]
        size = 0
        for name in names:
            if shards[-1] and size + self._bytes(name) > MAX_SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += self._bytes(name)
        return shards

    def _lay_out(self, file: str, shard: list[str]) -> None:
        entries = [(name, self._source.dtype(name), self._source.shape(name)) for name in shard]
        header, offsets = header_of(entries)
        self._headers[file] = header
        self._sizes[file] = len(header) + sum(self._bytes(name) for name in shard)
        groups: dict[str, list[_Place]] = {}
        for name in shard:
            groups.setdefault(kin(self._source, name), []).append(_Place(name, len(header) + offsets[name]))
        part: list[list[_Place]] = []
        size = number = 0
        for group in groups.values():
            part.append(group)
            size += sum(self._bytes(place.name) for place in group)
            if size >= PART_BYTES or group is list(groups.values())[-1]:
                self._parts[file, number] = part
                self._jobs.append(Job(file, size, number))
                part, size, number = [], 0, number + 1

    def _bytes(self, name: str) -> int:
        return math.prod(self._source.shape(name)) * self._source.dtype(name).itemsize

    def _file(self, index: int) -> str:
        count = len(self._shards)
        return SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def weights_only(opened: Opened, options: Options) -> Opened:
    """Without optimizer states, for which a model folder has no place."""
    lines = [
        Line(f"{slot} of all weights", "skipped", "model folders hold no optimizer state")
        for slot in opened.optimizer
    ]
    return replace(opened, optimizer={}, report=[*opened.report, *lines])


FORMAT = Format("hf", "Hugging Face folder", detect, open_hf, HfTarget, takes=weights_only)
