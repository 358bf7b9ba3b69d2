"""Digests of whole tensors, made of the values that pass by.

The digest of a tensor is the XXH3-128 of the XXH3-128s, one after the other, of each 4 MiB block of its bytes:
row-major, little endian, in the order of the Hugging Face tensor. Blocks, because several processes each see a part:
what they saw adds up to the digest, and only blocks that no one saw whole are read again. XXH3 is as quick as memory,
and proof against mistakes and damage, not against somebody who makes two tensors of one digest on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor

from megatune.checkpoint.convert.base import kin
from megatune.checkpoint.manifest import DTYPE_NAMES
from megatune.checkpoint.sources import TensorSource
from megatune.errors import CheckpointError

BLOCK_BYTES = 4 << 20
# Portions in which tensors are read: small enough for the processor's caches, and for malloc to use memory again.
PORTION_BYTES = 8 << 20

Blocks = dict[int, str]  # number of a block -> its XXH3-128

DIGEST = "xxh3_128"


class BlockHashes:
    """Blocks of one tensor of `size` bytes, from runs of its bytes in any order."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.found: Blocks = {}
        self._next = -1  # where the open block goes on
        self._open: Any = None

    def add(self, start: int, data: memoryview) -> None:
        """Bytes [start, start + len(data))."""
        place = start
        if place != self._next:
            self._open = None
        while place < start + len(data):
            number, inside = divmod(place, BLOCK_BYTES)
            end = min((number + 1) * BLOCK_BYTES, self.size)
            piece = data[place - start : end - start]
            if inside == 0:
                if len(piece) == end - place:  # all of it is here
                    self.found[number] = xxhash.xxh3_128_hexdigest(piece)
                    self._open = None
                else:
                    self._open = xxhash.xxh3_128()
            if self._open is not None:
                self._open.update(piece)
                if place + len(piece) == end:
                    self.found[number] = self._open.hexdigest()
                    self._open = None
            place += len(piece)
        self._next = place


def missing_blocks(size: int, found: Blocks) -> list[int]:
    return [number for number in range(-(-size // BLOCK_BYTES)) if number not in found]


def whole_digest(size: int, found: Blocks) -> str:
    """The digest of a tensor whose blocks are all there."""
    digest = xxhash.xxh3_128()
    for number in range(-(-size // BLOCK_BYTES)):
        digest.update(bytes.fromhex(found[number]))
    return digest.hexdigest()


def size_of(source: TensorSource, name: str) -> int:
    """Bytes of a tensor."""
    return math.prod(source.shape(name)) * source.dtype(name).itemsize


def describe(source: TensorSource, name: str, found: Blocks) -> dict[str, Any]:
    """What megatune-digests.json says of a tensor."""
    return {
        "shape": list(source.shape(name)),
        "dtype": DTYPE_NAMES[source.dtype(name)],
        DIGEST: whole_digest(size_of(source, name), found),
    }


class Digested:
    """A `TensorSource` that hashes what is read from it. `passed`: called with the bytes of each read."""

    def __init__(self, source: TensorSource, passed: Any = None) -> None:
        self._source, self.passed = source, passed
        self._hashes: dict[str, BlockHashes] = {}

    def __str__(self) -> str:
        return str(self._source)

    def names(self) -> set[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    def kin(self, name: str) -> str:
        return kin(self._source, name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        tensor = self._source.rows(name, start, stop).contiguous()
        shape = self.shape(name)
        if tensor.dtype != self.dtype(name) or tuple(tensor.shape) != (stop - start, *shape[1:]):
            raise CheckpointError(
                f"{self}: {name} is {tensor.dtype} {list(tensor.shape)} where {self.dtype(name)} "
                f"{[stop - start, *shape[1:]]} was announced; the checkpoint is damaged"
            )
        data = bytes_of(tensor)
        if name not in self._hashes:
            self._hashes[name] = BlockHashes(size_of(self._source, name))
        self._hashes[name].add(start * (len(data) // max(1, stop - start)), data)
        if self.passed is not None:
            self.passed(len(data))
        return tensor

    def take(self) -> dict[str, Blocks]:
        """Blocks found since the last call."""
        found = {name: hashes.found for name, hashes in self._hashes.items() if hashes.found}
        self._hashes = {}
        return found


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the host."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")


def portions(
    source: TensorSource, name: str, first: int = 0, last: int | None = None
) -> Iterator[tuple[int, int]]:
    """Rows [first, last) of a tensor in portions of about PORTION_BYTES."""
    shape = source.shape(name)
    last = shape[0] if last is None else last
    row = max(1, math.prod(shape[1:]) * source.dtype(name).itemsize)
    step = max(1, PORTION_BYTES // row)
    for start in range(first, last, step):
        yield start, min(last, start + step)


def complete(source: TensorSource, name: str, found: Blocks, passed: Any = None) -> Blocks:
    """The blocks of a tensor that are not in `found`, read from `source`."""
    size = size_of(source, name)
    wanted = missing_blocks(size, found)
    if not wanted:
        return {}
    shape = source.shape(name)
    row = size // shape[0]
    hashed = Digested(source, passed)
    runs: list[list[int]] = []
    for number in wanted:
        if runs and runs[-1][1] == number:
            runs[-1][1] = number + 1
        else:
            runs.append([number, number + 1])
    for first, last in runs:
        start, stop = first * BLOCK_BYTES // row, min(shape[0], -(-last * BLOCK_BYTES // row))
        for a, b in portions(source, name, start, stop):
            hashed.rows(name, a, b)
    return hashed.take().get(name, {})


def differences(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> list[str]:
    """Names whose digest, shape or dtype differ, or that only one side has."""
    return sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
