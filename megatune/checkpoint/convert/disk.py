"""Reading and writing that keep the disk busy: the next portion is read while this one is written, what is written
goes to the disk at once, and nobody waits for it but a thread that does nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

# Writing out begins and ends at multiples of this: a page that two portions share is not written twice.
_ALIGNED = 1 << 20
# A portion larger than this is written before the next is read: two of them could be all the memory there is.
_LARGE = 32 << 20
_END: Any = object()

T = TypeVar("T")


@contextmanager
def opened(path: Path, size: int | None = None) -> Iterator[int]:
    """A file for writing at any place, by several processes where `size`, its bytes, is given; else it starts empty.
    `Syncing` puts it on disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
    descriptor = os.open(path, flags | (os.O_TRUNC if size is None else 0), 0o666)
    try:
        if size is not None:
            os.ftruncate(descriptor, size)
        yield descriptor
    finally:
        os.close(descriptor)


def write_at(descriptor: int, data: memoryview, offset: int) -> int:
    """Write all of `data` at byte `offset`; returns where it ends."""
    start, end = offset, offset + len(data)
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
    first, last = start // _ALIGNED * _ALIGNED, end // _ALIGNED * _ALIGNED
    if first < last:  # Linux starts to write these pages out, without waiting for it
        os.posix_fadvise(descriptor, first, last - first, os.POSIX_FADV_DONTNEED)
    return end


def ahead(items: Iterator[T], size: Callable[[T], int]) -> Iterator[T]:
    """The same items, each made by a thread of its own while the one before it is used; not beside one that is large,
    by its `size` in bytes."""
    with ThreadPoolExecutor(1) as beside:
        following: Future[T] | None = beside.submit(next, items, _END)
        while (item := following.result()) is not _END:
            is_large = size(item) > _LARGE
            following = None if is_large else beside.submit(next, items, _END)
            yield item
            del item
            following = following or beside.submit(next, items, _END)


class Syncing:
    """A thread that waits for the disk. `add` what was made at a path (a file, or a folder of files); `done` is called,
    in that thread, once it is on disk. A context manager: at a clean end everything is. OSError where the disk fails,
    in `add` or at the end.
    """

    def __init__(self) -> None:
        self._beside = ThreadPoolExecutor(1)
        self._waiting: SimpleQueue[tuple[Path, Callable[[], None]]] = SimpleQueue()
        self._running: list[Future[None]] = []

    def add(self, path: Path, done: Callable[[], None]) -> None:
        for one in [one for one in self._running if one.done()]:
            one.result()
            self._running.remove(one)
        self._waiting.put((path, done))
        self._running.append(self._beside.submit(self._sync))

    def _sync(self) -> None:
        """All that waits by now: a file that several parts of are made is synced once for them."""
        taken = []
        while not self._waiting.empty():  # only this thread takes
            taken.append(self._waiting.get())
        for path in dict.fromkeys(path for path, _ in taken):
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    sync_file(file)
        for _, done in taken:
            done()

    def __enter__(self) -> Syncing:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._beside.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for one in self._running:
                one.result()


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)
