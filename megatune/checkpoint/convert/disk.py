"""Writing that keeps the disk busy: what is written goes to the disk at once, not when the file is synced."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def opened(path: Path, size: int | None = None) -> Iterator[int]:
    """A file for writing at any place, by several processes where `size`, its bytes, is given; else it starts empty.
    It is on disk afterwards."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
    descriptor = os.open(path, flags | (os.O_TRUNC if size is None else 0), 0o666)
    try:
        if size is not None:
            os.ftruncate(descriptor, size)
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_at(descriptor: int, data: memoryview, offset: int) -> int:
    """Write all of `data` at byte `offset`; returns where it ends."""
    start, end = offset, offset + len(data)
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
    # Linux starts to write these pages out, without waiting for it.
    os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)
    return end
