"""The manifest: what a checkpoint folder must hold to be one. Written last; without a valid one there is nothing.

`manifest.json` lists each global tensor with the boxes (chunks) it was written in, and each file with its size and the
XXH3 (64 bits) of every 4 MiB block. A block is what a reader has to read and check to trust any byte in it, so that
loading a slice verifies just what it reads. XXH3 lets one damage in 2**64 pass, and is as quick as memory: at 7 GB/s a
core it is not what a fast disk waits for. It is no protection against forgery: who can change a file can change the
manifest too. The manifest itself carries its SHA-256. Format 1 had CRC-32, and is read still.

No layout is recorded beside the boxes, and nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from megatune.checkpoint.boxes import tile_exactly
from megatune.checkpoint.files import open_regular
from megatune.checkpoint.safetensors_file import DTYPES
from megatune.errors import CheckpointError
from megatune.parallel.shard import Box

BLOCK_BYTES = 4 * 2**20
FORMAT = 2
MANIFEST = "manifest.json"
RUN = "run.json"

_PREFIX, _MIDDLE, _SUFFIX = b'{"sha256": "', b'",\n"manifest": ', b"}\n"
_DIGEST_CHARACTERS = 64
# Of one block, by the name that manifests have for it, and its hexadecimal digits.
_CHECKSUMS: dict[str, tuple[Callable[[Any], int], int]] = {
    "xxh3_64": (xxhash.xxh3_64_intdigest, 16),
    "crc32": (zlib.crc32, 8),
}
_NOW = "xxh3_64"
_KIND_BY_FORMAT = {1: "crc32", FORMAT: _NOW}
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
# A manifest has some 150 bytes a chunk: these are for 2 million of them. The smallest chunk has three brackets.
_LARGEST = 300_000_000
_BYTES_PER_BRACKET = 15
_MOST_DIMENSIONS = 64

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
    """`checksums`: of each block of BLOCK_BYTES, the last one shorter. `kind`: "xxh3_64", or "crc32" in manifests of
    format 1."""

    size: int
    checksums: tuple[int, ...]
    kind: str = _NOW

    def is_right(self, block: int, data: memoryview | bytes) -> bool:
        """Whether `data` is what was written as that block."""
        return _CHECKSUMS[self.kind][0](data) == self.checksums[block]


@dataclass(frozen=True)
class Manifest:
    step: int
    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, FileEntry]


def check_tensors(tensors: Mapping[str, TensorEntry], files: Container[str]) -> None:
    """Raise CheckpointError unless every tensor's chunks cover it exactly and lie in files that are listed."""
    for name, entry in tensors.items():
        if any(chunk.file not in files for chunk in entry.chunks):
            raise CheckpointError(f"{name}: a chunk lies in a file that was not written")
        if not tile_exactly([chunk.box for chunk in entry.chunks], entry.shape):
            raise CheckpointError(f"{name}: its chunks do not cover {entry.shape} exactly once")


class BlockChecksums:
    """Checksums by block of a stream of bytes, as they are written."""

    def __init__(self) -> None:
        self.size = 0
        self._finished: list[int] = []
        self._current = xxhash.xxh3_64()

    def add(self, data: memoryview | bytes) -> None:
        rest = memoryview(data)
        while rest:
            piece = rest[: BLOCK_BYTES - self.size % BLOCK_BYTES]
            self._current.update(piece)
            self.size += len(piece)
            if self.size % BLOCK_BYTES == 0:
                self._finished.append(self._current.intdigest())
                self._current.reset()
            rest = rest[len(piece) :]

    def entry(self) -> FileEntry:
        rest = [self._current.intdigest()] if self.size % BLOCK_BYTES else []
        return FileEntry(self.size, (*self._finished, *rest))


def dump_manifest(manifest: Manifest) -> bytes:
    """The text of manifest.json."""
    return join_manifest(manifest.step, manifest.files, tensors_to_text(manifest.tensors))


def tensors_to_text(tensors: Mapping[str, TensorEntry]) -> bytes:
    """What manifest.json says about tensors: the same for all saves of one layout."""
    return json.dumps({name: tensor_to_json(entry) for name, entry in sorted(tensors.items())}).encode()


def join_manifest(step: int, files: Mapping[str, FileEntry], tensors: bytes) -> bytes:
    """The text of manifest.json from that of its `tensors`."""
    head = json.dumps(
        {
            "format": FORMAT,
            "step": step,
            "block_bytes": BLOCK_BYTES,
            "files": {name: file_to_json(entry) for name, entry in sorted(files.items())},
        }
    ).encode()
    body = head[:-1] + b', "tensors": ' + tensors + b"}"
    return _PREFIX + hashlib.sha256(body).hexdigest().encode() + _MIDDLE + body + _SUFFIX


def parse_manifest(text: bytes, path: Path) -> Manifest:
    """The manifest in `text` (the bytes of the file `path`). Raises DamagedError where any bit of it is wrong, and
    where it says what no writer would: it may come from anyone."""
    start = len(_PREFIX) + _DIGEST_CHARACTERS + len(_MIDDLE)
    body = text[start : -len(_SUFFIX)]
    frame = _PREFIX + hashlib.sha256(body).hexdigest().encode() + _MIDDLE
    if text[:start] != frame or text[-len(_SUFFIX) :] != _SUFFIX:
        raise DamagedError(f"{path} is damaged: its checksum is not that of its text")
    try:
        data = read_json(body)
        kind = _KIND_BY_FORMAT.get(data["format"]) if type(data["format"]) is int else None
        if kind is None:
            raise CheckpointError(
                f"{path} has format {short(data['format'])}, this version of megatune reads up to {FORMAT}; use a "
                f"newer version"
            )
        if data["block_bytes"] != BLOCK_BYTES:
            raise ValueError(f"blocks of {short(data['block_bytes'])} bytes")
        files = {_plain_name(name): file_from_json(entry, kind) for name, entry in data["files"].items()}
        if RUN not in files:
            raise ValueError(f"{RUN} is not among its files")
        tensors = {name: tensor_from_json(entry) for name, entry in data["tensors"].items()}
        _check_sizes(tensors, files)
        return Manifest(_whole_number(data["step"]), tensors, files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"{path} is not a manifest of megatune: {short(error)}") from error


def read_json(text: bytes) -> Any:
    """A JSON text of ours that may come from anyone. Raises ValueError also where it would take far more memory than
    bytes, has a key twice, or is nested too deep."""
    if text.count(b"[") + text.count(b"{") > 100 + len(text) // _BYTES_PER_BRACKET:
        raise ValueError("there is next to nothing in its brackets")
    try:
        return json.loads(text, object_pairs_hook=_without_twins)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{short(next(n for n in names if names.count(n) > 1))} is there twice")
    return found


def short(what: object) -> str:
    """For a message: what came from a file, or an error about it, may be of any length."""
    is_ours = isinstance(what, ValueError)
    text, most = (str(what), 400) if is_ours else (repr(what), 100)
    return text if len(text) <= most else text[:most] + "..."


def _check_sizes(tensors: Mapping[str, TensorEntry], files: Mapping[str, FileEntry]) -> None:
    """Raise ValueError where the files are too small for the tensors: before anybody makes room for these."""
    room = {name: entry.size for name, entry in files.items()}
    for name, entry in tensors.items():
        for chunk in entry.chunks:
            left = room.get(chunk.file, 0) - chunk.box.numel * entry.dtype.itemsize
            if left < 0:
                raise ValueError(f"{short(name)} does not fit into {chunk.file}")
            room[chunk.file] = left
        if sum(chunk.box.numel for chunk in entry.chunks) != math.prod(entry.shape):
            raise ValueError(f"the chunks of {short(name)} do not cover it exactly once")


def read_manifest(step_folder: Path) -> Manifest:
    """The manifest of a checkpoint. Raises DamagedError where it is missing or damaged."""
    path = Path(step_folder) / MANIFEST
    try:
        descriptor, size = open_regular(path)
    except OSError as error:
        raise DamagedError(
            f"{path} cannot be read ({error.strerror}): the checkpoint was never finished"
        ) from error
    with open(descriptor, "rb") as file:
        start = file.read(len(_PREFIX))
        if start != _PREFIX or size > _LARGEST:
            what = "does not begin as one" if size <= _LARGEST else f"has {size} bytes"
            raise DamagedError(f"{path} is not a manifest of megatune: it {what}")
        return parse_manifest(start + file.read(), path)


def file_to_json(entry: FileEntry) -> dict[str, Any]:
    digits = _CHECKSUMS[entry.kind][1]
    return {"size": entry.size, entry.kind: "".join(f"{value:0{digits}x}" for value in entry.checksums)}


def file_from_json(data: dict[str, Any], kind: str = _NOW) -> FileEntry:
    """What `file_to_json` made, with checksums of that kind."""
    digits = _CHECKSUMS[kind][1]
    size, text = _whole_number(data["size"]), data[kind]
    if len(text) != digits * -(-size // BLOCK_BYTES):
        raise ValueError(f"{len(text) // digits} checksums for {size} bytes")
    values = (int(text[i : i + digits], 16) for i in range(0, len(text), digits))
    return FileEntry(size, tuple(values), kind)


def tensor_to_json(entry: TensorEntry) -> dict[str, Any]:
    chunks = [
        {"file": c.file, "key": c.key, "offset": list(c.box.offset), "shape": list(c.box.shape)}
        for c in entry.chunks
    ]
    return {"dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "chunks": chunks}


def tensor_from_json(data: dict[str, Any]) -> TensorEntry:
    shape = _shape(data["shape"])
    chunks = []
    for item in data["chunks"]:
        box = Box(_shape(item["offset"]), _shape(item["shape"]))
        if len(box.offset) != len(shape) or len(box.shape) != len(shape):
            raise ValueError(f"chunk {short(item)} does not have {len(shape)} dimensions")
        if any(o + n > s for o, n, s in zip(box.offset, box.shape, shape, strict=True)):
            raise ValueError(f"chunk {short(item)} lies outside of its tensor")
        if not isinstance(item["key"], str):
            raise ValueError(f"{short(item['key'])} is not a name")
        chunks.append(Chunk(_plain_name(item["file"]), item["key"], box))
    return TensorEntry(DTYPES[data["dtype"]], shape, tuple(chunks))


def _shape(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > _MOST_DIMENSIONS:
        raise ValueError(f"{short(values)} is not the shape of a tensor")
    return tuple(map(_whole_number, values))


def _whole_number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"{short(value)} is not a number of bytes or elements")
    return value


def _plain_name(name: Any) -> str:
    """A file name that cannot lead out of the checkpoint's folder."""
    if not isinstance(name, str) or not _PLAIN.fullmatch(name):
        raise ValueError(f"{short(name)} is not the name of a file in the folder")
    return name
