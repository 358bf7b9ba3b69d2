"""One safetensors file: read by slices of rows, written tensor by tensor.

Format: 8 bytes header length (little endian), a JSON header {name: {dtype, shape, data_offsets}}, then the tensors'
bytes without gaps (https://github.com/huggingface/safetensors#format). Reading is by positioned reads into the final
tensor: no memory map whose pages count against the host, and large requests on network file systems.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megatune.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit of the reference implementation
_ONE_READ = 1 << 30  # Linux reads less than 2 GiB in one call


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `offset` of its first byte from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A safetensors file open for reading: a `TensorSource`. CheckpointError where it is missing or damaged."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from error
        try:
            self.entries = self._read_header()
        except BaseException:
            self.close()
            raise

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> set[str]:
        return set(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.entries[name].dtype

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of dimension 0 of a tensor, in the file's dtype, on the host."""
        entry = self.entries[name]
        if not 0 <= start <= stop <= entry.shape[0]:
            raise ValueError(f"{name}: rows {start} to {stop} of {entry.shape[0]}")
        row = entry.bytes // entry.shape[0] if entry.shape[0] else 0
        buffer = torch.empty((stop - start) * row, dtype=torch.uint8)
        view, offset = memoryview(buffer.numpy()), entry.offset + start * row
        while view:
            count = os.preadv(self._descriptor, [view[:_ONE_READ]], offset)
            if count == 0:
                raise CheckpointError(f"{self.path}: became shorter while {name} was read; copy it again")
            view, offset = view[count:], offset + count
        return buffer.view(entry.dtype).view(stop - start, *entry.shape[1:])

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()

    def _read_header(self) -> dict[str, Entry]:
        size = os.fstat(self._descriptor).st_size
        start = os.pread(self._descriptor, 8, 0)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _MAX_HEADER or 8 + length > size:
            raise self._damaged(f"{size} bytes, without a whole header")
        try:
            header = json.loads(os.pread(self._descriptor, length, 8))
            header.pop("__metadata__", None)
            entries = {name: self._entry(name, item, 8 + length) for name, item in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged("its header cannot be parsed") from error
        end = max((entry.offset + entry.bytes for entry in entries.values()), default=8 + length)
        if end != size:
            raise self._damaged(f"{size} bytes instead of {end}")
        return entries

    def _entry(self, name: str, item: dict, data: int) -> Entry:
        if item["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name} has dtype {item['dtype']}, which megatune cannot read"
            )
        start, stop = item["data_offsets"]
        shape = tuple(int(n) for n in item["shape"])
        entry = Entry(DTYPES[item["dtype"]], shape, data + int(start))
        if start < 0 or any(n < 0 for n in shape) or stop - start != entry.bytes:
            raise self._damaged(f"the header's size of {name} does not fit its shape")
        return entry

    def _damaged(self, how: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: truncated or damaged ({how}); download or copy it again")


def header_of(
    entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
) -> tuple[bytes, dict[str, int]]:
    """(the bytes before the tensors', where each tensor begins after them) of a file with tensors (name, dtype, shape)
    in this order."""
    # transformers refuses files without it
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    offset = 0
    for name, dtype, shape in entries:
        if offset % dtype.itemsize:
            raise ValueError(
                f"{name}: order the tensors by falling size of their dtypes, so that each is aligned"
            )
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offsets[name] = offset
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offsets


class SafetensorsWriter:
    """Writes a safetensors file one tensor after the other, so that one tensor at a time is in memory.

    `entries`: (name, dtype, shape) in the order in which `write` will be called. A context manager: on a clean exit
    the file is whole and on disk.
    """

    def __init__(self, path: str | Path, entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        self.path = Path(path)
        self._expected = [(name, dtype, tuple(shape)) for name, dtype, shape in entries]
        header, _ = header_of(self._expected)
        self._next = 0
        self._file = open(self.path, "wb")  # noqa: SIM115 - closed by close or abort
        self._file.write(header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor (any device); ValueError where it is not the one announced."""
        announced = self._expected[self._next] if self._next < len(self._expected) else None
        if announced != (name, tensor.dtype, tuple(tensor.shape)):
            raise ValueError(f"wrote {name} {tensor.dtype} {tuple(tensor.shape)}, announced was {announced}")
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        self._file.write(memoryview(raw.numpy()))
        self._next += 1

    def close(self) -> None:
        """Put the whole file on disk; ValueError where a tensor is missing."""
        if self._next != len(self._expected):
            raise ValueError(f"{self.path}: {self._expected[self._next][0]} was announced but not written")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abort(self) -> None:
        """Close the file as it is."""
        self._file.close()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.abort()
