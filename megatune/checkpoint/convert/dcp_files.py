"""A torch.distributed.checkpoint folder, read lazily by boxes, and written file by file.

Reading goes through the index alone (`dcp_metadata`) and through pickles read as data. What is written here opens with
`torch.distributed.checkpoint.load` and with Megatron-Core's `dist_checkpointing.load`, which is built on it.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatune.checkpoint.convert.dcp_metadata import (
    METADATA,
    Chunk,
    Index,
    Place,
    Stored,
    metadata_bytes,
    read_index,
)
from megatune.checkpoint.convert.pickles import LazyTensor, open_pickle_at
from megatune.checkpoint.convert.torch_zip import Streamed, pickled
from megatune.checkpoint.convert.zip_entries import File
from megatune.errors import CheckpointError

SUFFIX = ".distcp"
MOST_CHUNK_BYTES = 1 << 28  # of one chunk written: memory, and far from what needs a zip64 archive
_FILE_BYTES = 1 << 30
_KEPT_HEADERS = 4096
_ALIGNMENT = 64
_ROOT = "archive/"


class DcpFolder:
    """The tensors and blobs of a folder: a `TensorSource`. CheckpointError where the index is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder)
        self._files: dict[str, File] = {}
        self._headers: OrderedDict[Place, LazyTensor] = OrderedDict()
        self._check_sizes()

    def __str__(self) -> str:
        return str(self.folder)

    def names(self) -> set[str]:
        return set(self.index.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.index.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.index.tensors[name].dtype

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of dimension 0."""
        shape = self.shape(name)
        return self.box(name, (start, *(0 for _ in shape[1:])), (stop - start, *shape[1:]))

    def box(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The elements [offsets, offsets + sizes) of a tensor, contiguous, in its own dtype. Reads of each chunk the
        rows (of its dimension 0) that it needs."""
        stored = self.index.tensors[name]
        ends = [at + size for at, size in zip(offsets, sizes, strict=True)]
        if any(at < 0 or end > most for at, end, most in zip(offsets, ends, stored.shape, strict=True)):
            raise ValueError(f"{name}: {list(offsets)} to {ends} of {list(stored.shape)}")
        out: Tensor | None = None
        for chunk in stored.near(offsets, sizes):
            first = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
            last = [min(a, b + n) for a, b, n in zip(ends, chunk.offsets, chunk.sizes, strict=True)]
            if any(a >= b for a, b in zip(first, last, strict=True)):
                continue
            block = self._part(name, stored, chunk, first, last)
            if list(block.shape) == list(sizes):
                return block.contiguous()
            if out is None:
                out = torch.empty(tuple(sizes), dtype=stored.dtype)
            target = out
            for dim, (a, b, at) in enumerate(zip(first, last, offsets, strict=True)):
                target = target.narrow(dim, a - at, b - a)
            target.copy_(block)
        return torch.empty(tuple(sizes), dtype=stored.dtype) if out is None else out

    def blob(self, name: str) -> object:
        """What a blob (a `torch.save`) holds, as data."""
        place = self.index.blobs[name]
        return self._open(place)

    def _part(
        self, name: str, stored: Stored, chunk: Chunk, first: Sequence[int], last: Sequence[int]
    ) -> Tensor:
        """[first, last) of the tensor, all of it in `chunk`."""
        lazy = self._header(name, stored, chunk)
        if not first:
            return lazy.read()
        block = lazy.rows(first[0] - chunk.offsets[0], last[0] - chunk.offsets[0])
        for dim in range(1, len(first)):
            block = block.narrow(dim, first[dim] - chunk.offsets[dim], last[dim] - first[dim])
        return block

    def _header(self, name: str, stored: Stored, chunk: Chunk) -> LazyTensor:
        """The chunk's tensor, unread. Headers of the chunks that were read last are kept."""
        found = self._headers.pop(chunk.place, None)
        if found is None:
            path = self.folder / chunk.place.file
            found = self._open(chunk.place)
            if (
                not isinstance(found, LazyTensor)
                or found.dtype != stored.dtype
                or tuple(found.shape) != chunk.sizes
            ):
                raise CheckpointError(
                    f"{path}: what stands at byte {chunk.place.offset} is not the {stored.dtype} tensor "
                    f"{list(chunk.sizes)} that the index announces for {name}; copy the folder again"
                )
        self._headers[chunk.place] = found
        if len(self._headers) > _KEPT_HEADERS:
            self._headers.popitem(last=False)
        return found

    def _open(self, place: Place) -> object:
        if place.file not in self._files:
            self._files[place.file] = File(self.folder / place.file)
        return open_pickle_at(self._files[place.file], place.offset, place.length)

    def _check_sizes(self) -> None:
        """Chunks that share their bytes could make a small folder as large as they like."""
        tensors = self.index.tensors.values()
        claimed = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)
        files = {chunk.place.file for tensor in tensors for chunk in tensor.chunks}
        there = sum((self.folder / file).stat().st_size for file in files)
        if claimed > there:
            raise CheckpointError(
                f"{self.folder / METADATA}: announces {claimed} bytes of tensors, the files have {there}; copy the "
                "folder again"
            )


@dataclass(frozen=True)
class Part:
    """One chunk to be written: box [offsets, offsets + sizes) of tensor `name`; `make` gives its elements."""

    name: str
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    make: Callable[[], Tensor]

    @cached_property
    def _text(self) -> bytes:
        return pickled(Streamed(self.dtype, self.sizes, tuple))

    @property
    def bytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return sum(len(piece) for piece in self._around(0)) + self.bytes

    def write(self) -> Iterator[bytes | memoryview]:
        """What `torch.save` of the chunk would write: a zip archive."""
        tensor = self.make()
        if tensor.dtype != self.dtype or tuple(tensor.shape) != self.sizes:
            raise ValueError(
                f"{self.name}: {tensor.dtype} {list(tensor.shape)}, announced {self.dtype} {self.sizes}"
            )
        data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        head, tail = self._around(zlib.crc32(data))
        yield head
        yield data
        yield tail

    def _around(self, crc: int) -> tuple[bytes, bytes]:
        """What stands before and after the data, whose checksum is `crc`."""
        return _archive(self._text, self.bytes, crc)


def torch_blob(value: Any) -> bytes:
    """`torch.save` of something small without tensors."""
    return b"".join(_archive(pickled(value)))


def _archive(text: bytes, size: int | None = None, crc: int = 0) -> tuple[bytes, bytes]:
    """What stands before and after the one storage (None: there is none) of a file of torch.save; `text`: its pickle.
    The storage comes last, so that only its own header depends on the checksum."""
    head, directory = b"", b""
    small = (("data.pkl", text), ("byteorder", b"little"), ("version", b"3\n"))
    for name, data in small:
        entry = _Entry(_ROOT + name, len(data), zlib.crc32(data), len(head))
        head += entry.local() + data
        directory += entry.central()
    count, at = len(small), len(head)
    if size is not None:
        last = _Entry(f"{_ROOT}data/0", size, crc, len(head))
        head += last.local(padding=-(len(head) + last.header_size) % _ALIGNMENT)
        directory += last.central()
        count, at = count + 1, len(head) + size
    return head, directory + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(directory), at, 0)


@dataclass(frozen=True)
class _Entry:
    """A stored member of a zip archive (APPNOTE 4.3.7, 4.3.12), of less than 4 GiB."""

    name: str
    size: int
    crc: int
    offset: int

    @property
    def header_size(self) -> int:
        """Of the local header, with an extra field of no bytes."""
        return 34 + len(self.name)

    def _common(self) -> bytes:
        # Stored, 1 January 1980, names in ASCII.
        return struct.pack("<5H3I", 20, 0, 0, 0, 33, self.crc, self.size, self.size)

    def local(self, padding: int = 0) -> bytes:
        extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
        return (
            b"PK\3\4"
            + self._common()
            + struct.pack("<2H", len(self.name), len(extra))
            + self.name.encode()
            + extra
        )

    def central(self) -> bytes:
        return (
            b"PK\1\2"
            + struct.pack("<H", 20)
            + self._common()
            + struct.pack("<5H2I", len(self.name), 0, 0, 0, 0, 0, self.offset)
            + self.name.encode()
        )


@dataclass(frozen=True)
class Blob:
    """Bytes to be written, mostly a `torch.save` of something that is no tensor."""

    name: str
    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def write(self) -> Iterator[bytes]:
        yield self.data


@dataclass(frozen=True)
class DataFile:
    """One file to be written, with all that stands in it, in this order."""

    name: str
    items: tuple[Part | Blob, ...]

    @cached_property
    def size(self) -> int:
        return sum(item.size for item in self.items)

    def places(self) -> Iterator[tuple[Part | Blob, Place]]:
        offset = 0
        for item in self.items:
            yield item, Place(self.name, offset, item.size)
            offset += item.size

    def write(self, folder: Path) -> None:
        """Write it and wait for the disk; memory: one chunk."""
        with open(folder / self.name, "wb") as file:
            for item, place in self.places():
                for piece in item.write():
                    file.write(piece)
                if file.tell() != place.offset + place.length:
                    raise ValueError(f"{folder / self.name}: {item.name} has another size than planned")
            file.flush()
            os.fsync(file.fileno())


def cut(
    name: str,
    dtype: torch.dtype,
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    make: Callable[[int, int], Tensor],
    dim: int = 0,
) -> list[Part]:
    """Parts of a box, none larger than MOST_CHUNK_BYTES, cut along `dim`; `make(start, stop)`: the elements of a part,
    [start, stop) along `dim` of the box."""
    whole = math.prod(sizes) * dtype.itemsize
    if not sizes or whole <= MOST_CHUNK_BYTES:
        return [Part(name, dtype, offsets, sizes, lambda: make(0, sizes[dim] if sizes else 1))]
    step = max(1, sizes[dim] * MOST_CHUNK_BYTES // whole)
    parts = []
    for start in range(0, sizes[dim], step):
        stop = min(start + step, sizes[dim])
        at = (*offsets[:dim], offsets[dim] + start, *offsets[dim + 1 :])
        part = (*sizes[:dim], stop - start, *sizes[dim + 1 :])
        parts.append(Part(name, dtype, at, part, lambda start=start, stop=stop: make(start, stop)))
    return parts


def plan_files(items: Iterable[Part | Blob], rank: int = 0) -> list[DataFile]:
    """Files of about a GiB, in the order of `items`."""
    groups: list[list[Part | Blob]] = [[]]
    size = 0
    for item in items:
        if groups[-1] and size + item.size > _FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.size
    return [DataFile(f"__{rank}_{i}{SUFFIX}", tuple(g)) for i, g in enumerate(groups) if g]


def write_metadata(folder: Path, files: Iterable[DataFile]) -> None:
    """Write the index of `files`, which are there, and wait for the disk."""
    chunks: dict[str, list[Chunk]] = {}
    dtypes: dict[str, torch.dtype] = {}
    blobs: dict[str, Place] = {}
    for file in files:
        for item, place in file.places():
            if isinstance(item, Blob):
                blobs[item.name] = place
            else:
                dtypes[item.name] = item.dtype
                chunks.setdefault(item.name, []).append(Chunk(item.offsets, item.sizes, place))
    tensors = {}
    for name, found in chunks.items():
        ends = [[c.offsets[dim] + c.sizes[dim] for c in found] for dim in range(len(found[0].sizes))]
        tensors[name] = Stored(dtypes[name], tuple(max(end) for end in ends), tuple(found))
    with open(folder / METADATA, "wb") as file:
        file.write(metadata_bytes(Index(tensors, blobs, {})))
        file.flush()
        os.fsync(file.fileno())
