"""The few file operations that a checkpoint is made of.

Everything that touches the disk while a checkpoint is written, published or pruned goes through this module's
functions, called as `files.NAME(...)`: the tests wrap them to record, fail or kill at the n-th one.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path


def make_folder(path: Path) -> None:
    """Make a folder; its parent must be there. No error where it exists."""
    path.mkdir(exist_ok=True)


def create(path: Path) -> int:
    """Open a new, empty file for writing; returns the file descriptor."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)


def write(descriptor: int, data: memoryview | bytes) -> None:
    """Write all of `data` at the file's end."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync(descriptor: int) -> None:
    """Wait until the file's bytes are on the disk."""
    os.fsync(descriptor)


def close(descriptor: int) -> None:
    os.close(descriptor)


def begin_sync(descriptor: int, start: int, length: int) -> None:
    """A hint: put these bytes on the disk soon, and do not keep them in the page cache. `sync` has less to do then."""
    os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)


def sync_folder(path: Path) -> None:
    """Wait until the folder's entries (new names, renames) are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def forget_cached(path: Path) -> None:
    """Drop a synced file from the page cache (a hint): what is read next comes from the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Atomic; a file at `target` is replaced, a folder there must be empty."""
    os.replace(source, target)


def remove_file(path: Path) -> None:
    path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a folder (never what a link leads to) and what is in it; no error where it does not exist."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def write_whole(path: Path, data: bytes) -> None:
    """A small file, durable when this returns (its name only after `sync_folder`)."""
    descriptor = create(path)
    try:
        write(descriptor, data)
        sync(descriptor)
    finally:
        close(descriptor)


def make_folders(path: Path) -> None:
    """Make a folder and its missing parents, all of them durable when this returns."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        make_folder(folder)
        sync_folder(folder.parent)


def open_regular(path: Path) -> tuple[int, int]:
    """(descriptor, size) of a file to read. OSError also where it is none: a link could lead out of the checkpoint, and
    a pipe would make the reader wait forever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor, status.st_size
