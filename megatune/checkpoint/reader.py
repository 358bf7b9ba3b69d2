"""Reading boxes of global tensors out of a checkpoint's files, each byte verified before it is used."""

from __future__ import annotations

import math
import os
import zlib
from pathlib import Path

import torch
from torch import Tensor

from megatune.checkpoint.boxes import within
from megatune.checkpoint.manifest import BLOCK_BYTES, Chunk, DamagedError, FileEntry
from megatune.checkpoint.safetensors_file import SafetensorsFile
from megatune.errors import CheckpointError
from megatune.parallel.shard import Box

# Host memory that one thread reads into at a time.
_SLAB_BYTES = 16 * BLOCK_BYTES


class CheckpointFile:
    """One file of a checkpoint, read by byte ranges. Used by several threads at once.

    It is opened for each read: a checkpoint may have more files than a process may have open. `verify`: check the
    CRC-32 of each block that is touched. Raises DamagedError where the file is missing, has another size, or a block
    is not what was written.
    """

    def __init__(self, path: Path, entry: FileEntry, *, verify: bool = True) -> None:
        self.path = path
        self._entry = entry
        self._verify = verify
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DamagedError(f"{path} is missing ({error.strerror})") from error
        if size != entry.size:
            raise DamagedError(f"{path} has {size} bytes instead of {entry.size}")

    def read(self, start: int, stop: int) -> Tensor:
        """Bytes [start, stop) as uint8 [stop - start]; whole blocks are read."""
        if not 0 <= start <= stop <= self._entry.size:
            raise DamagedError(f"{self.path}: bytes {start} to {stop} of {self._entry.size} are asked for")
        first = start - start % BLOCK_BYTES
        last = min(-(-stop // BLOCK_BYTES) * BLOCK_BYTES, self._entry.size)
        buffer = torch.empty(last - first, dtype=torch.uint8)
        whole = memoryview(buffer.numpy())
        try:
            _read_into(self.path, whole, first)
        except OSError as error:
            raise DamagedError(f"{self.path} cannot be read: {error.strerror or error}") from error
        if self._verify:
            self._check(whole, first)
        return buffer[start - first : stop - first]

    def read_all(self) -> bytes:
        """The whole of a small file."""
        return self.read(0, self._entry.size).numpy().tobytes()

    def verify_all(self) -> None:
        """Read every block and raise DamagedError at the first that is wrong."""
        for start in range(0, self._entry.size, _SLAB_BYTES):
            self.read(start, min(start + _SLAB_BYTES, self._entry.size))

    def _check(self, data: memoryview, first: int) -> None:
        for offset in range(0, len(data), BLOCK_BYTES):
            block = (first + offset) // BLOCK_BYTES
            if zlib.crc32(data[offset : offset + BLOCK_BYTES]) != self._entry.checksums[block]:
                where = block * BLOCK_BYTES
                raise DamagedError(f"{self.path} is damaged between bytes {where} and {where + BLOCK_BYTES}")


class ShardFile(CheckpointFile):
    """A `rank-*.safetensors` file: its header verified and parsed, its tensors read by boxes."""

    def __init__(self, path: Path, entry: FileEntry, *, verify: bool = True) -> None:
        super().__init__(path, entry, verify=verify)
        try:
            length = int.from_bytes(self.read(0, min(8, entry.size)).numpy().tobytes(), "little")
            self.read(0, min(8 + length, entry.size))
            parsed = SafetensorsFile(path)
        except CheckpointError as error:
            raise error if isinstance(error, DamagedError) else DamagedError(str(error)) from error
        self._tensors = parsed.entries
        parsed.close()

    def fill(self, target: Tensor, target_box: Box, chunk: Chunk, dtype: torch.dtype) -> int:
        """Copy the elements that `chunk` and `target_box` share into `target` (any device, any strides; it fills
        `target_box`). Returns how many they are."""
        common = target_box & chunk.box
        if common is None:
            return 0
        stored = self._tensors.get(chunk.key)
        if stored is None or stored.shape != chunk.box.shape or stored.dtype != dtype:
            raise DamagedError(f"{self.path} does not hold {chunk.key} as its manifest says")
        destination = within(common, target_box).of(target)
        self._copy(destination, stored.offset, chunk.box.shape, within(common, chunk.box))
        return common.numel

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
        rows_at_once = max(1, _SLAB_BYTES // row_bytes)
        for row in range(0, rows, rows_at_once):
            count = min(rows_at_once, rows - row)
            slab = self._elements(start + (first + row) * row_bytes, (count, *rest), target.dtype)
            target.narrow(0, row, count).copy_(
                Box((0, *source.offset[1:]), (count, *source.shape[1:])).of(slab)
            )

    def _elements(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.read(start, start + math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def _read_into(path: Path, data: memoryview, position: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while data:
            count = os.preadv(descriptor, [data], position)
            if count == 0:
                raise OSError("it became shorter")
            data, position = data[count:], position + count
    finally:
        os.close(descriptor)
