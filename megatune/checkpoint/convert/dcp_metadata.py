"""The index of a torch.distributed.checkpoint folder: `.metadata`, a pickle, read as data and written as torch does.

A tensor is a list of chunks (boxes of it), each of them one `torch.save` of a tensor somewhere in a `*.distcp` file;
what is no tensor is a blob of bytes. Sources: torch/distributed/checkpoint/metadata.py and filesystem.py (2.13).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatune.checkpoint.convert.pickles import Opaque, read_pickle
from megatune.checkpoint.convert.torch_zip import Instance, pickled
from megatune.errors import CheckpointError

METADATA = ".metadata"
_MODULE = "torch.distributed.checkpoint.metadata"
_STORAGE = "torch.distributed.checkpoint.filesystem"
_MOST_BYTES = 1 << 31  # of .metadata; a model of 671B parameters on 4,096 processes needs a tenth
_MOST_CELLS = 1 << 26
_MOST_DIMS = 16


@dataclass(frozen=True)
class Place:
    """Where a blob stands: `length` bytes at `offset` of `file` in the folder."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor and where it is stored."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place


@dataclass(frozen=True)
class Stored:
    """One tensor of the folder; its chunks cover it once."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @cached_property
    def _ordered(self) -> tuple[list[Chunk], list[int]]:
        """The chunks in the order of their offsets, and the largest size in each dimension."""
        sizes = [max(chunk.sizes[dim] for chunk in self.chunks) for dim in range(len(self.shape))]
        return sorted(self.chunks, key=_offsets), sizes

    def near(self, offsets: Sequence[int], sizes: Sequence[int]) -> Sequence[Chunk]:
        """The chunks that may hold a part of a box: few, where stacked experts or flat buckets have thousands."""
        if len(self.chunks) < 16 or not offsets:
            return self.chunks
        ordered, most = self._ordered
        low, high = (offsets[0] - most[0] + 1,), (offsets[0] + sizes[0],)
        if len(offsets) > 1 and sizes[0] == most[0] == 1:  # stacked: look along the second axis
            low, high = (offsets[0], offsets[1] - most[1] + 1), (offsets[0], offsets[1] + sizes[1])
        return ordered[bisect_left(ordered, low, key=_offsets) : bisect_left(ordered, high, key=_offsets)]


@dataclass(frozen=True)
class Index:
    """What `.metadata` says: tensors and blobs by name, and the path in the nested state dict that each name came from
    (where the writer flattened one)."""

    tensors: dict[str, Stored]
    blobs: dict[str, Place]
    paths: dict[str, tuple[Any, ...]]


def _offsets(chunk: Chunk) -> tuple[int, ...]:
    return chunk.offsets


def read_index(folder: Path) -> Index:
    """The index of `folder`. Nothing that it names is imported or called; paths that leave the folder, files that are
    not there, places beyond a file's end, and chunks that do not cover their tensor are a CheckpointError."""
    path = folder / METADATA
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise CheckpointError(f"{path}: {size} bytes are no index; copy the folder again")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); is the folder complete?"
        ) from error
    root = read_pickle(data, {"torch.Size": _size}, where=str(path))
    try:
        return _Reader(folder).index(root)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: is damaged or of a version that megatune does not know ({error}); copy the folder again"
        ) from error


def _size(values: Any = ()) -> tuple[int, ...]:
    """torch.Size, as a tuple."""
    if not isinstance(values, (tuple, list)) or len(values) > _MOST_DIMS:
        raise ValueError("a shape of that many dimensions")
    for value in values:
        if type(value) is not int or not 0 <= value < 1 << 48:
            raise ValueError("a shape that cannot be")
    return tuple(values)


class _Reader:
    """Opaque objects -> `Index`. Errors of damage are ValueError and the like, for `read_index`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sizes: dict[str, int] = {}

    def index(self, root: Any) -> Index:
        fields = _fields(root, ("state_dict_metadata", "planner_data", "storage_data"))
        places: dict[tuple[str, tuple[int, ...] | None], Place] = {}
        for key, info in _pairs(fields["storage_data"]):
            at = _fields(key, ("fqn", "offset", "index"))
            offset = at.get("offset")
            places[_text(at["fqn"]), None if offset is None else _size(offset)] = self._place(info)
        tensors: dict[str, Stored] = {}
        blobs: dict[str, Place] = {}
        for name, entry in _pairs(fields["state_dict_metadata"]):
            if _kind(entry) == "BytesStorageMetadata":
                blobs[_text(name)] = places[name, None]
            else:
                tensors[_text(name)] = self._tensor(name, entry, places)
        return Index(tensors, blobs, _paths(fields.get("planner_data")))

    def _tensor(self, name: str, entry: Any, places: Mapping[Any, Place]) -> Stored:
        fields = _fields(entry, ("properties", "size", "chunks"))
        properties = fields["properties"]
        state = properties.state if properties.state is not None else properties.args
        dtype = state["dtype"] if isinstance(state, dict) else state[0]
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{name} has no dtype")
        shape, chunks = _size(fields["size"]), []
        for chunk in fields["chunks"]:
            box = _fields(chunk, ("offsets", "sizes"))
            offsets, sizes = _size(box["offsets"]), _size(box["sizes"])
            if len(offsets) != len(shape) or len(sizes) != len(shape):
                raise ValueError(f"a chunk of {name} has other dimensions")
            if not shape or math.prod(sizes):
                place = places[name, offsets]
                if math.prod(sizes) * dtype.itemsize > place.length:
                    raise CheckpointError(
                        f"{self._folder / place.file}: {name} would need {math.prod(sizes) * dtype.itemsize} bytes, "
                        f"but has {place.length}; copy the folder again"
                    )
                chunks.append(Chunk(offsets, sizes, place))
        if not _covers(shape, chunks):
            raise CheckpointError(
                f"{self._folder / METADATA}: the chunks of {name} do not cover its shape {list(shape)} once; was the "
                "save cut, or did not every process of it write?"
            )
        return Stored(dtype, shape, tuple(chunks))

    def _place(self, info: Any) -> Place:
        fields = _fields(info, ("relative_path", "offset", "length", "transform_descriptors"))
        file, offset, length = _text(fields["relative_path"]), fields["offset"], fields["length"]
        if fields.get("transform_descriptors"):
            raise CheckpointError(
                f"{self._folder}: is stored transformed ({fields['transform_descriptors']}), which megatune cannot "
                "undo; save it without extensions"
            )
        if file not in self._sizes:
            self._sizes[file] = self._file_size(file)
        if type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
            raise ValueError(f"a place of {file} is no place")
        if offset + length > self._sizes[file]:
            raise CheckpointError(
                f"{self._folder / file}: has {self._sizes[file]} bytes, but the index refers to byte "
                f"{offset + length}; copy the folder again"
            )
        return Place(file, offset, length)

    def _file_size(self, file: str) -> int:
        if not file or file in (".", "..") or any(sign in file for sign in "/\\\0"):
            raise CheckpointError(
                f"{self._folder / METADATA}: refers to {file!r}, which is no file of this folder; get the checkpoint "
                "again from a source that you trust"
            )
        path = self._folder / file
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, though the index lists it; copy the folder again")
        return path.stat().st_size


def _fields(value: Any, order: tuple[str, ...]) -> dict[str, Any]:
    """A data class's fields, from its state or from what its constructor got."""
    if not isinstance(value, Opaque):
        raise ValueError("no data class where one is expected")
    return dict(zip(order, value.args or (), strict=False)) | value.kwargs | value.attributes


def _pairs(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Opaque):  # a subclass of dict
        return value.items
    if not isinstance(value, dict):
        raise ValueError("no dictionary where one is expected")
    return value.items()


def _kind(value: Any) -> str:
    if not isinstance(value, Opaque):
        raise ValueError("no data class where one is expected")
    return value.name.rpartition(".")[2]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a name that is no text")
    return value


def _paths(planner: Any) -> dict[str, tuple[Any, ...]]:
    """The default planner's notes; other planners' are none of ours."""
    if not isinstance(planner, dict):
        return {}
    return {name: path for name, path in planner.items() if isinstance(name, str) and isinstance(path, tuple)}


def _covers(shape: tuple[int, ...], chunks: list[Chunk]) -> bool:
    """Whether the chunks are inside of `shape` and hold each element once."""
    for chunk in chunks:
        ends = [at + size for at, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        if any(end > size for end, size in zip(ends, shape, strict=True)):
            return False
    total = math.prod(shape)
    if sum(math.prod(chunk.sizes) for chunk in chunks) != total:
        return False
    if len(chunks) <= 1 or total == 0:
        return True
    # As many elements as there are: then every cell of the grid of all borders must be hit.
    borders = [
        sorted({0, size, *(c.offsets[dim] for c in chunks), *(c.offsets[dim] + c.sizes[dim] for c in chunks)})
        for dim, size in enumerate(shape)
    ]
    cells = math.prod(len(border) - 1 for border in borders)
    if cells > _MOST_CELLS:
        return False
    hit = np.zeros([len(border) - 1 for border in borders], dtype=bool)
    places = [{at: place for place, at in enumerate(border)} for border in borders]
    for chunk in chunks:
        box = tuple(
            slice(places[dim][at], places[dim][at + size])
            for dim, (at, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True))
        )
        hit[box] = True
    return bool(hit.all())


def metadata_bytes(index: Index) -> bytes:
    """The `.metadata` of a folder: a pickle of torch's own data classes, made by their constructors, which have had
    these arguments since torch 2.1."""
    entries: dict[str, Instance] = {}
    storage: dict[Instance, Instance] = {}
    for name, tensor in index.tensors.items():
        chunks = [
            Instance(f"{_MODULE}.ChunkStorageMetadata", (torch.Size(chunk.offsets), torch.Size(chunk.sizes)))
            for chunk in tensor.chunks
        ]
        properties = Instance(f"{_MODULE}.TensorProperties", (tensor.dtype,))
        entries[name] = Instance(
            f"{_MODULE}.TensorStorageMetadata", (properties, torch.Size(tensor.shape), chunks)
        )
        for number, chunk in enumerate(tensor.chunks):
            at = Instance(f"{_MODULE}.MetadataIndex", (name, torch.Size(chunk.offsets), number))
            storage[at] = _storage_info(chunk.place)
    for name, place in index.blobs.items():
        entries[name] = Instance(f"{_MODULE}.BytesStorageMetadata")
        storage[Instance(f"{_MODULE}.MetadataIndex", (name,))] = _storage_info(place)
    paths = dict(index.paths) or None
    return pickled(Instance(f"{_MODULE}.Metadata", (entries, paths, storage)))


def _storage_info(place: Place) -> Instance:
    return Instance(f"{_STORAGE}._StorageInfo", (place.file, place.offset, place.length))
