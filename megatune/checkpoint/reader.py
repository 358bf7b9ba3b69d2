"""Reading boxes of global tensors out of a checkpoint's files, each byte verified before it is used."""

from __future__ import annotations

import math
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatune.checkpoint.boxes import within
from megatune.checkpoint.files import open_regular
from megatune.checkpoint.manifest import BLOCK_BYTES, Chunk, DamagedError, FileEntry, Manifest
from megatune.checkpoint.safetensors_file import SafetensorsFile
from megatune.errors import CheckpointError
from megatune.parallel.shard import Box, Parts

# Host memory that one thread reads into at a time.
_SLAB_BYTES = 16 * BLOCK_BYTES
# More than there are cores: some wait for the disk while others check and copy.
_THREADS = 4
# A header says for each tensor no more than this beside its name.
_HEADER_BYTES = 1024


class _Descriptor:
    """A file that is open for reading, until this object goes."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number, _ = open_regular(path)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class _Slab(threading.local):
    """What this thread has read last: blocks of one file, in memory that it uses again. `opened`, `descriptor`: the
    file that it reads at present; Linux reads ahead, in large pages, of what is read on through one descriptor."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.of: CheckpointFile | None = None
        self.first = self.last = 0
        self.opened: CheckpointFile | None = None
        self.descriptor: _Descriptor | None = None

    def close(self) -> None:
        """The file alone."""
        self.opened = self.descriptor = None

    def clear(self) -> None:
        self.close()
        self.of, self.memory = None, torch.empty(0, dtype=torch.uint8)


_slab = _Slab()


class CheckpointFile:
    """One file of a checkpoint, read by byte ranges. Used by several threads at once.

    Each thread has one file open at a time: a checkpoint may have more files than a process may have open. `verify`:
    check each block that is touched against its checksum. Raises DamagedError where the file is missing, has another
    size, or a block is not what was written.
    """

    def __init__(self, path: Path, entry: FileEntry, *, verify: bool = True) -> None:
        self.path = path
        self._entry = entry
        self._verify = verify
        try:
            status = path.lstat()
        except OSError as error:
            raise DamagedError(f"{path} is missing ({error.strerror})") from error
        if not stat.S_ISREG(status.st_mode):
            raise DamagedError(f"{path} is not a regular file")
        if status.st_size != entry.size:
            raise DamagedError(f"{path} has {status.st_size} bytes instead of {entry.size}")

    def read(self, start: int, stop: int) -> Tensor:
        """Bytes [start, stop) as uint8 [stop - start], in memory that this thread's next `read` uses again. Whole
        blocks are read, and kept until then."""
        if not 0 <= start <= stop <= self._entry.size:
            raise DamagedError(f"{self.path}: bytes {start} to {stop} of {self._entry.size} are asked for")
        if _slab.of is not self or not _slab.first <= start or not stop <= _slab.last:
            self._read_blocks(
                start - start % BLOCK_BYTES, min(-(-stop // BLOCK_BYTES) * BLOCK_BYTES, self._entry.size)
            )
        return _slab.memory[start - _slab.first : stop - _slab.first]

    def read_into(self, data: memoryview, start: int) -> None:
        """Fill `data` with the bytes from `start` on. Block by block, so that a block is still in the processor's cache
        when its checksum is computed; whole ones go straight to their place."""
        stop, position = start + len(data), start
        while position < stop:
            first = position - position % BLOCK_BYTES
            last = min(first + BLOCK_BYTES, self._entry.size, stop)
            part = data[position - start : last - start]
            if position == first and last == min(first + BLOCK_BYTES, self._entry.size):
                self._read_verified(part, first)
            else:
                part[:] = memoryview(self.read(position, last).numpy())
            position = last

    def _read_blocks(self, first: int, last: int) -> None:
        _slab.of = None
        if _slab.memory.numel() < last - first:
            _slab.memory = torch.empty(max(last - first, BLOCK_BYTES), dtype=torch.uint8)
        self._read_verified(memoryview(_slab.memory.numpy())[: last - first], first)
        _slab.of, _slab.first, _slab.last = self, first, last

    def _read_verified(self, blocks: memoryview, first: int) -> None:
        try:
            if _slab.opened is not self:
                _slab.close()
                _slab.descriptor, _slab.opened = _Descriptor(self.path), self
            _read_into(_slab.descriptor.number, blocks, first)
        except OSError as error:
            raise DamagedError(f"{self.path} cannot be read: {error.strerror or error}") from error
        if self._verify:
            self._check(blocks, first)

    def read_all(self, most: int) -> bytes:
        """The whole of a small file. Raises DamagedError where it has more than `most` bytes."""
        if self._entry.size > most:
            raise DamagedError(f"{self.path} has {self._entry.size} bytes; {most} are the most")
        return self.read(0, self._entry.size).numpy().tobytes()

    def verify_all(self) -> None:
        """Read every block and raise DamagedError at the first that is wrong."""
        size = self._entry.size

        def read(start: int) -> None:
            for first in range(start, min(start + _SLAB_BYTES, size), BLOCK_BYTES):
                self.read(first, min(first + BLOCK_BYTES, size))

        in_threads(read, range(0, size, _SLAB_BYTES))
        _slab.clear()

    def _check(self, data: memoryview, first: int) -> None:
        for offset in range(0, len(data), BLOCK_BYTES):
            block = (first + offset) // BLOCK_BYTES
            if not self._entry.is_right(block, data[offset : offset + BLOCK_BYTES]):
                where = block * BLOCK_BYTES
                raise DamagedError(f"{self.path} is damaged between bytes {where} and {where + BLOCK_BYTES}")


class ShardFile(CheckpointFile):
    """A `rank-*.safetensors` file: its header verified and parsed, its tensors read by boxes.

    `keys`: the names of the tensors in it that the manifest knows of.
    """

    def __init__(self, path: Path, entry: FileEntry, keys: Iterable[str], *, verify: bool = True) -> None:
        super().__init__(path, entry, verify=verify)
        most = sum(_HEADER_BYTES + 12 * len(key) for key in keys) + _HEADER_BYTES
        try:
            length = int.from_bytes(self.read(0, min(8, entry.size)).numpy().tobytes(), "little")
            if length > most:
                raise DamagedError(
                    f"{path} has a header of {length} bytes; {most} are the most for its tensors"
                )
            self.read(0, min(8 + length, entry.size))
            parsed = SafetensorsFile(path)
        except CheckpointError as error:
            raise error if isinstance(error, DamagedError) else DamagedError(str(error)) from error
        self._tensors = parsed.entries
        parsed.close()

    def offset(self, chunk: Chunk, dtype: torch.dtype) -> int:
        """Of the first byte of a chunk. Raises DamagedError where it is not there as the manifest says."""
        stored = self._tensors.get(chunk.key)
        if stored is None or stored.shape != chunk.box.shape or stored.dtype != dtype:
            raise DamagedError(f"{self.path} does not hold {chunk.key} as its manifest says")
        return stored.offset

    def fill(self, target: Tensor, chunk: Chunk, common: Box) -> None:
        """Copy the elements `common` of the global tensor, which `chunk` has, into `target` (just these; any device,
        any strides)."""
        start = self.offset(chunk, target.dtype)
        self._copy(target, start, chunk.box.shape, within(common, chunk.box))

    def _copy(self, target: Tensor, start: int, shape: tuple[int, ...], source: Box) -> None:
        """The elements `source` of the tensor of `shape` that begins at byte `start` into `target`."""
        if not shape:  # a scalar
            target.copy_(self._elements(start, (), target.dtype))
            return
        rest = shape[1:]
        row_bytes = math.prod(rest) * target.dtype.itemsize
        first, rows = source.offset[0], source.shape[0]
        if len(shape) > 2 and source.shape[1:] != rest:  # some rows of some matrices: these, and no others
            inner = Box(source.offset[1:], source.shape[1:])
            for row in range(rows):
                self._copy(target[row], start + (first + row) * row_bytes, rest, inner)
            return
        if source.shape[1:] == rest and target.device.type == "cpu" and target.is_contiguous():
            data = memoryview(target.detach().view(-1).view(torch.uint8).numpy())
            self.read_into(data, start + first * row_bytes)
            return
        rows_at_once = max(1, _SLAB_BYTES // row_bytes)
        for row in range(0, rows, rows_at_once):
            count = min(rows_at_once, rows - row)
            slab = self._elements(start + (first + row) * row_bytes, (count, *rest), target.dtype)
            if source.shape[1:] != rest:
                slab = Box((0, *source.offset[1:]), (count, *source.shape[1:])).of(slab)
            (target if count == rows else target.narrow(0, row, count)).copy_(slab)

    def _elements(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.read(start, start + math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


@dataclass(frozen=True)
class _Item:
    """Elements that one thread reads at once: `common` of the global tensor, from `chunk` to `tensor`. `start`: of the
    first byte in the file."""

    shard: ShardFile
    chunk: Chunk
    common: Box
    tensor: Tensor
    start: int


def fill(folder: Path, manifest: Manifest, state: Mapping[str, Parts], *, verify: bool) -> None:
    """Fill the parts of tensors that `manifest` has, with the same shapes and dtypes, from the files in `folder`.

    Several threads read, each a stretch of a file from its beginning to its end: small tensors that share a block are
    read with it once. Raises DamagedError.
    """
    wanted = [
        (chunk, box, tensor, common)
        for name, parts in state.items()
        for box, tensor in parts.parts
        for chunk in manifest.tensors[name].chunks
        if (common := box & chunk.box) is not None
    ]
    names = {chunk.file for chunk, *_ in wanted}
    keys: dict[str, list[str]] = {name: [] for name in names}
    for entry in manifest.tensors.values():
        for chunk in entry.chunks:
            if chunk.file in names:
                keys[chunk.file].append(chunk.key)
    opened = in_threads(
        lambda name: ShardFile(folder / name, manifest.files[name], keys[name], verify=verify), sorted(names)
    )
    shards = dict(zip(sorted(names), opened, strict=True))
    items = [
        item
        for chunk, box, tensor, common in wanted
        for item in _items(shards[chunk.file], chunk, box, tensor, common)
    ]
    in_threads(_fill_stretch, _stretches(items))
    _slab.clear()


def _items(shard: ShardFile, chunk: Chunk, box: Box, tensor: Tensor, common: Box) -> Iterator[_Item]:
    """What `common` takes to read: several pieces of its rows where it is large, for several threads."""
    target = tensor if common.shape == box.shape else within(common, box).of(tensor)
    row_bytes = math.prod(chunk.box.shape[1:]) * target.dtype.itemsize
    offset = shard.offset(chunk, target.dtype)
    rows = max(1, _SLAB_BYTES // max(1, row_bytes))
    if not target.ndim or target.shape[0] <= rows:
        row = common.offset[0] - chunk.box.offset[0] if target.ndim else 0
        yield _Item(shard, chunk, common, target, offset + row * row_bytes)
        return
    for begin in range(0, target.shape[0], rows):
        part = target[begin : begin + rows]
        here = Box((common.offset[0] + begin, *common.offset[1:]), tuple(part.shape))
        yield _Item(shard, chunk, here, part, offset + (here.offset[0] - chunk.box.offset[0]) * row_bytes)


def _stretches(items: Iterable[_Item]) -> list[list[_Item]]:
    """The items in the order of the files, about a slab's worth together."""
    in_order = sorted(items, key=lambda item: (str(item.shard.path), item.start))
    return [
        list(group)
        for _, group in groupby(in_order, key=lambda item: (item.shard, item.start // _SLAB_BYTES))
    ]


@torch.no_grad()
def _fill_stretch(items: list[_Item]) -> None:
    for item in items:
        item.shard.fill(item.tensor, item.chunk, item.common)


def in_threads(work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """`work` of each item, in order; the first error is raised."""
    items = list(items)
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(_THREADS, len(items))) as pool:
        return list(pool.map(work, items))


def _read_into(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        count = os.preadv(descriptor, [data], position)
        if count == 0:
            raise OSError("it became shorter")
        data, position = data[count:], position + count
