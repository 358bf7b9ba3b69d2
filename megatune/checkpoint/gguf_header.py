"""The header of a GGUF file, walked before the gguf library reads it: that trusts every count and length in it.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from megatune.errors import CheckpointError

_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_MOST_DIMENSIONS = 4
_MOST_ITEMS = 1 << 24  # of all arrays: the library makes an object of each


def check_header(path: Path) -> None:
    """CheckpointError where a count or length in the header goes beyond the file."""
    try:
        with open(path, "rb") as file:
            _Walk(file, path.stat().st_size).header()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, struct.error) as error:
        raise CheckpointError(
            f"{path}: not a GGUF file, or truncated ({error}); download it again"
        ) from error


class _Walk:
    """A file being walked through; ValueError where it ends too early."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left, self._items = file, size, 0
        self._order = "<"

    def header(self) -> None:
        if self._take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._number("I")
        if version & 0xFFFF == 0:
            self._order = ">"
        tensors, values = self._number("Q"), self._number("Q")
        # A value takes 13 bytes at least, the description of a tensor 24.
        if values * 13 + tensors * 24 > self._left:
            raise ValueError(f"{tensors} tensors and {values} values do not fit into it")
        for _ in range(values):
            self._string()
            self._value(self._number("I"))
        for _ in range(tensors):
            self._string()
            dimensions = self._number("I")
            if dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            self._skip(8 * dimensions + 12)

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            inner, count = self._number("I"), self._number("Q")
            least = 8 if inner == _STRING else self._size(inner)
            self._items += count
            if count * least > self._left or self._items > _MOST_ITEMS:
                raise ValueError(f"an array of {count} values")
            if inner == _STRING:
                for _ in range(count):
                    self._string()
            else:
                self._skip(count * least)
        else:
            self._skip(self._size(kind))

    def _size(self, kind: int) -> int:
        if kind not in _SIZES:
            raise ValueError(f"a value of type {kind}")
        return _SIZES[kind]

    def _string(self) -> None:
        self._skip(self._number("Q"))

    def _number(self, form: str) -> int:
        return struct.unpack(self._order + form, self._take(struct.calcsize(form)))[0]

    def _take(self, count: int) -> bytes:
        data = self._file.read(count)
        self._left -= count
        if len(data) != count:
            raise ValueError("its header is cut off")
        return data

    def _skip(self, count: int) -> None:
        if count > self._left:
            raise ValueError(f"{count} bytes where {self._left} are left")
        self._left -= count
        self._file.seek(count, 1)
