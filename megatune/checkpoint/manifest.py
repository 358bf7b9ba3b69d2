"""The manifest: what a checkpoint folder must hold to be one. Written last; without a valid one there is nothing.

`manifest.json` lists each global tensor with the boxes (chunks) it was written in, and each file with its size and the
CRC-32 of every 4 MiB block. A block is what a reader has to read and check to trust any byte in it, so that loading a
slice verifies just what it reads. CRC-32 finds every error burst of up to 32 bits, and any other damage but for one
case in 2**32; at 3 GB/s a core it costs less than the disk. The manifest itself carries its SHA-256.

No layout is recorded beside the boxes, and nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatune.checkpoint.boxes import tile_exactly
from megatune.checkpoint.safetensors_file import DTYPES
from megatune.errors import CheckpointError
from megatune.parallel.shard import Box

BLOCK_BYTES = 4 * 2**20
FORMAT = 1
MANIFEST = "manifest.json"
RUN = "run.json"

_PREFIX, _MIDDLE, _SUFFIX = b'{"sha256": "', b'",\n"manifest": ', b"}\n"
_DIGEST_CHARACTERS = 64

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class DamagedError(CheckpointError):
    """A checkpoint is torn or its bytes are not those that were written; an older one may be whole."""


@dataclass(frozen=True)
class Chunk:
    """One box of a global tensor, stored under `key` in `file` (a name inside the checkpoint's folder)."""

    file: str
    key: str
    box: Box


@dataclass(frozen=True)
class TensorEntry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class FileEntry:
    """`checksums`: CRC-32 of each block of BLOCK_BYTES, the last one shorter."""

    size: int
    checksums: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    step: int
    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, FileEntry]

    def check(self) -> None:
        """Raise CheckpointError unless every tensor's chunks cover it exactly and lie in files that are listed."""
        for name, entry in self.tensors.items():
            if any(chunk.file not in self.files for chunk in entry.chunks):
                raise CheckpointError(f"{name}: a chunk lies in a file that was not written")
            if not tile_exactly([chunk.box for chunk in entry.chunks], entry.shape):
                raise CheckpointError(f"{name}: its chunks do not cover {entry.shape} exactly once")


class BlockChecksums:
    """CRC-32 by block of a stream of bytes, as they are written."""

    def __init__(self) -> None:
        self.size = 0
        self._finished: list[int] = []
        self._current = 0

    def add(self, data: memoryview | bytes) -> None:
        rest = memoryview(data)
        while rest:
            piece = rest[: BLOCK_BYTES - self.size % BLOCK_BYTES]
            self._current = zlib.crc32(piece, self._current)
            self.size += len(piece)
            if self.size % BLOCK_BYTES == 0:
                self._finished.append(self._current)
                self._current = 0
            rest = rest[len(piece) :]

    def entry(self) -> FileEntry:
        rest = [self._current] if self.size % BLOCK_BYTES else []
        return FileEntry(self.size, (*self._finished, *rest))


def dump_manifest(manifest: Manifest) -> bytes:
    """The text of manifest.json."""
    body = json.dumps(
        {
            "format": FORMAT,
            "step": manifest.step,
            "block_bytes": BLOCK_BYTES,
            "files": {name: file_to_json(entry) for name, entry in sorted(manifest.files.items())},
            "tensors": {name: tensor_to_json(entry) for name, entry in sorted(manifest.tensors.items())},
        }
    ).encode()
    return _PREFIX + hashlib.sha256(body).hexdigest().encode() + _MIDDLE + body + _SUFFIX


def parse_manifest(text: bytes, path: Path) -> Manifest:
    """The manifest in `text` (the bytes of the file `path`). Raises DamagedError where any bit of it is wrong."""
    start = len(_PREFIX) + _DIGEST_CHARACTERS + len(_MIDDLE)
    body = text[start : -len(_SUFFIX)]
    frame = _PREFIX + hashlib.sha256(body).hexdigest().encode() + _MIDDLE
    if text[:start] != frame or text[-len(_SUFFIX) :] != _SUFFIX:
        raise DamagedError(f"{path} is damaged: its checksum is not that of its text")
    try:
        data = json.loads(body)
        if data["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has format {data['format']}, this version of megatune reads {FORMAT}; use a newer version"
            )
        if data["block_bytes"] != BLOCK_BYTES:
            raise ValueError(f"blocks of {data['block_bytes']} bytes")
        files = {_plain_name(name): file_from_json(entry) for name, entry in data["files"].items()}
        tensors = {name: tensor_from_json(entry) for name, entry in data["tensors"].items()}
        return Manifest(int(data["step"]), tensors, files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"{path} is not a manifest of megatune: {error!r}") from error


def read_manifest(step_folder: Path) -> Manifest:
    """The manifest of a checkpoint. Raises DamagedError where it is missing or damaged."""
    path = Path(step_folder) / MANIFEST
    try:
        return parse_manifest(path.read_bytes(), path)
    except OSError as error:
        raise DamagedError(
            f"{path} cannot be read ({error.strerror}): the checkpoint was never finished"
        ) from error


def file_to_json(entry: FileEntry) -> dict[str, Any]:
    return {"size": entry.size, "crc32": "".join(f"{value:08x}" for value in entry.checksums)}


def file_from_json(data: dict[str, Any]) -> FileEntry:
    size, text = int(data["size"]), data["crc32"]
    checksums = tuple(int(text[i : i + 8], 16) for i in range(0, len(text), 8))
    if size < 0 or len(checksums) != -(-size // BLOCK_BYTES):
        raise ValueError(f"{len(checksums)} checksums for {size} bytes")
    return FileEntry(size, checksums)


def tensor_to_json(entry: TensorEntry) -> dict[str, Any]:
    chunks = [
        {"file": c.file, "key": c.key, "offset": list(c.box.offset), "shape": list(c.box.shape)}
        for c in entry.chunks
    ]
    return {"dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "chunks": chunks}


def tensor_from_json(data: dict[str, Any]) -> TensorEntry:
    shape = tuple(map(int, data["shape"]))
    chunks = []
    for item in data["chunks"]:
        box = Box(tuple(map(int, item["offset"])), tuple(map(int, item["shape"])))
        if len(box.offset) != len(shape) or len(box.shape) != len(shape):
            raise ValueError(f"chunk {item} does not have {len(shape)} dimensions")
        chunks.append(Chunk(_plain_name(item["file"]), item["key"], box))
    return TensorEntry(DTYPES[data["dtype"]], shape, tuple(chunks))


def _plain_name(name: str) -> str:
    """A file name that cannot lead out of the checkpoint's folder."""
    if not name or name.startswith(".") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file in the folder")
    return name
