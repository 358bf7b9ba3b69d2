"""What of a conversion is done: a conversion that was killed goes on, one of another source is refused."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from megatune.errors import CheckpointError

_FILE = ".megatune-journal.jsonl"
_LOCK = ".megatune-lock"


def identity(path: Path, words: dict[str, Any]) -> str:
    """Hex digest of what decides a conversion: the files at `path` (names, sizes, times of change) and `words`."""
    digest = hashlib.sha256(json.dumps(words, sort_keys=True, default=str).encode())
    files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
    for file in files:
        facts = file.stat()
        digest.update(f"{file.relative_to(path)}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


class Journal:
    """The hidden folder in which a destination is made, and which of its jobs are finished.

    `finished`: results by job, of this run and of those before. CheckpointError where the folder is of another
    conversion, or another process works in it.
    """

    def __init__(self, destination: Path, identity: str, source: str) -> None:
        self.folder = destination.with_name(f".{destination.name}.converting")
        self.finished: dict[str, Any] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / _LOCK, "w")  # noqa: SIM115 - held until close
        except OSError as error:
            raise CheckpointError(f"{destination}: cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{destination}: another process is converting to it; wait for it"
            ) from error
        except OSError:
            self._lock.flush()  # a file system without locks: nothing is promised there
        self._path = self.folder / _FILE
        self._read(destination, identity, source)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        if not self._path.stat().st_size:
            self._append({"identity": identity, "source": source})

    def _read(self, destination: Path, identity: str, source: str) -> None:
        text = self._path.read_bytes() if self._path.exists() else b""
        whole, length = [], 0
        for line in text.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # cut off in the middle
            whole.append(json.loads(line))
            length += len(line)
        if not whole:
            self._clear()
            return
        os.truncate(self._path, length)
        if whole[0]["identity"] != identity:
            raise CheckpointError(
                f"{self.folder}: a conversion of {whole[0]['source']} to {destination} was begun there, and it was not "
                f"this one ({source}: other files, format or options); finish that one, or remove the folder"
            )
        self.finished = {line["job"]: line["result"] for line in whole[1:]}

    def _clear(self) -> None:
        """Remove files that no journal knows."""
        for item in self.folder.iterdir():
            if item.name != _LOCK:
                shutil.rmtree(item) if item.is_dir() else item.unlink()

    def add(self, job: str, result: Any) -> None:
        """Write down that a job is done; its files are on disk."""
        self.finished[job] = result
        self._append({"job": job, "result": result})

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._file.flush()

    def publish(self, destination: Path) -> None:
        """The folder takes its place; nothing of the journal stays in it."""
        self._path.unlink()
        (self.folder / _LOCK).unlink()
        for item in sorted(self.folder.rglob("*")):
            _sync(item)
        _sync(self.folder)
        if destination.is_dir():
            destination.rmdir()  # empty, or it would have been refused
        self.folder.rename(destination)
        _sync(destination.parent)
        self.close()

    def close(self) -> None:
        self._file.close()
        self._lock.close()

    def remove(self) -> None:
        """Give up: nothing stays."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
