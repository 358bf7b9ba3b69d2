"""Files read by position, and the directory of a zip archive, whose members must be stored as they are.

`torch.save` never compresses, so a compressed member is refused: a zip bomb cannot unpack. Archives may lie inside a
larger file (DCP's `.distcp`). Format: PKWARE's APPNOTE.TXT 4.3, 4.5.3 (zip64).
"""

from __future__ import annotations

import os
import struct
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatune.errors import CheckpointError

_MOST_OPEN = 64  # files kept open: thousands of shards would run into the limit of descriptors
_MOST_DIRECTORY = 1 << 28  # bytes
_ONE_READ = 1 << 30  # Linux reads less than 2 GiB in one call
_END, _END64, _LOCATOR, _MEMBER, _LOCAL = b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\1\2", b"PK\3\4"


class _Descriptor:
    """A descriptor that is closed when the last reader let go of it."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


_open: OrderedDict[int, _Descriptor] = OrderedDict()
_lock = threading.Lock()


class File:
    """A file that is read by position, from any thread; opened again when it is needed. `size`: its bytes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.size = os.fstat(self._descriptor().number).st_size

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from byte `offset` on; CheckpointError where the file ends before."""
        descriptor = self._descriptor()
        while view:
            count = os.preadv(descriptor.number, [view[:_ONE_READ]], offset)
            if count == 0:
                raise CheckpointError(f"{self.path}: ends within a tensor or header; copy it again")
            view, offset = view[count:], offset + count

    def bytes(self, offset: int, count: int) -> bytes:
        buffer = bytearray(count)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def tensor(self, offset: int, count: int) -> Tensor:
        """uint8 [count]."""
        buffer = torch.empty(count, dtype=torch.uint8)
        self.read_into(memoryview(buffer.numpy()), offset)
        return buffer

    def _descriptor(self) -> _Descriptor:
        with _lock:
            found = _open.pop(id(self), None)
            if found is None:
                try:
                    found = _Descriptor(self.path)
                except OSError as error:
                    raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from error
            _open[id(self)] = found
            while len(_open) > _MOST_OPEN:
                _open.popitem(last=False)
            return found

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "size": self.size}

    def __del__(self) -> None:
        _open.pop(id(self), None)


@dataclass(frozen=True)
class Member:
    """Bytes of a file: [start, start + size)."""

    start: int
    size: int


def is_zip(file: File, start: int = 0, length: int | None = None) -> bool:
    length = file.size - start if length is None else length
    return length >= 22 and file.bytes(start, 4) in (_LOCAL, _END)


def zip_members(file: File, start: int = 0, length: int | None = None) -> dict[str, Member]:
    """Name -> place of each member of the archive at [start, start + length) of a file; default: the whole file."""
    stop = file.size if length is None else start + length
    if not 0 <= start <= stop <= file.size:
        raise CheckpointError(f"{file.path}: ends before byte {stop}; copy it again")
    try:
        return _members(file, start, stop)
    except (struct.error, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{file.path}: its zip directory is damaged or cut off; copy it again"
        ) from error


def _members(file: File, start: int, stop: int) -> dict[str, Member]:
    at, size, count = _directory(file, start, stop)
    if not (start <= at and size <= _MOST_DIRECTORY and at + size <= stop and 46 * count <= size):
        raise ValueError("a directory outside the file")
    data, place, found = file.bytes(at, size), 0, {}
    for _ in range(count):
        if data[place : place + 4] != _MEMBER:
            raise ValueError("no member")
        flags, method = struct.unpack_from("<HH", data, place + 8)
        packed, unpacked, name_size, extra_size, comment = struct.unpack_from("<IIHHH", data, place + 20)
        (header,) = struct.unpack_from("<I", data, place + 42)
        name = data[place + 46 : place + 46 + name_size].decode("utf-8", "replace")
        extra = data[place + 46 + name_size : place + 46 + name_size + extra_size]
        unpacked, packed, header = _wide(extra, (unpacked, packed, header))
        place += 46 + name_size + extra_size + comment
        if method or flags & 1 or packed != unpacked:
            raise CheckpointError(
                f"{file.path}: {name} is compressed or encrypted, which torch.save never does; unpack it yourself "
                "where you trust it"
            )
        if name in found:
            raise CheckpointError(f"{file.path}: has two members {name}; get the checkpoint again")
        found[name] = _member(file, start + header, unpacked, stop)
    return found


def _member(file: File, header: int, size: int, stop: int) -> Member:
    if header + 30 > stop:
        raise ValueError("a member outside the file")
    local = file.bytes(header, 30)
    name_size, extra_size = struct.unpack_from("<HH", local, 26)
    data = header + 30 + name_size + extra_size
    if local[:4] != _LOCAL or data + size > stop:
        raise ValueError("a member outside the file")
    return Member(data, size)


def _directory(file: File, start: int, stop: int) -> tuple[int, int, int]:
    """Place in the file, size and number of members of the directory."""
    tail = file.bytes(max(start, stop - 65557), min(65557, stop - start))
    end = tail.rindex(_END)
    count, size, at, comment = struct.unpack_from("<HIIH", tail, end + 10)
    if end + 22 + comment != len(tail):
        raise ValueError("cut off, or followed by something else")
    locator = end - 20
    if count == 0xFFFF or 0xFFFFFFFF in (size, at):
        if locator < 0 or tail[locator : locator + 4] != _LOCATOR:
            raise ValueError("no locator")
        (where,) = struct.unpack_from("<Q", tail, locator + 8)
        if start + where + 56 > stop:
            raise ValueError("outside the file")
        wide = file.bytes(start + where, 56)
        if wide[:4] != _END64:
            raise ValueError("no zip64 end")
        count, size, at = struct.unpack_from("<QQQ", wide, 32)
    return start + at, size, count


def _wide(extra: bytes, fields: tuple[int, int, int]) -> tuple[int, int, int]:
    """(unpacked, packed, header) with those that did not fit into 32 bits taken from the zip64 extra field."""
    if 0xFFFFFFFF not in fields:
        return fields
    place = 0
    while place + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, place)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{size // 8}Q", extra, place + 4))
            unpacked, packed, header = (next(values, -1) if one == 0xFFFFFFFF else one for one in fields)
            if min(unpacked, packed, header) < 0:
                raise ValueError("a zip64 field is missing")
            return unpacked, packed, header
        place += 4 + size
    raise ValueError("no zip64 field")
