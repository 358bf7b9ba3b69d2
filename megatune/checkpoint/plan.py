"""What a process writes in each save of a run: worked out once, from names and shapes alone."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatune.checkpoint.boxes import whole_box
from megatune.checkpoint.manifest import DTYPE_NAMES
from megatune.errors import CheckpointError
from megatune.parallel.shard import Box, Parts


@dataclass(frozen=True)
class Piece:
    """A tensor that this process writes under `key`: its part `box` of the global tensor `name`. `offset`: of its
    first byte behind the header of the file."""

    key: str
    name: str
    tensor: Tensor
    box: Box
    global_shape: tuple[int, ...]
    offset: int = 0


@dataclass(frozen=True)
class Plan:
    """One process's share of every save of one state.

    `file`: its name; `pieces`: in the order of the file; `header`: the beginning of the file; `size`: bytes behind it;
    `tensors`: JSON text of what the manifest will say about these pieces; `shared_digest`: of the names, shapes and
    dtypes of plain tensors, which must be the same on all processes.
    """

    file: str
    pieces: tuple[Piece, ...]
    header: bytes
    size: int
    tensors: bytes
    shared_digest: str

    @property
    def digest(self) -> str:
        """Two plans of one process that have the same are the same in the manifest."""
        return hashlib.sha256(self.tensors).hexdigest()


def make_plan(state: Mapping[str, Tensor | Parts], rank: int, world_size: int) -> Plan:
    """What this process writes. Of `Parts`, the process that `writes` them does; plain tensors are the same everywhere
    and are dealt out by size. Raises CheckpointError for a dtype that cannot be saved."""
    mine: list[Piece] = []
    shared: list[Piece] = []
    for name, value in state.items():
        if isinstance(value, Tensor):
            shared.append(Piece(name, name, value.detach(), whole_box(value.shape), tuple(value.shape)))
        elif value.writes:
            for index, (box, tensor) in enumerate(value.parts):
                key = f"{name}#{index}" if index else name
                mine.append(Piece(key, name, tensor.detach(), box, value.shape))
    for piece in (*mine, *shared):
        if piece.tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{piece.name}: tensors of dtype {piece.tensor.dtype} cannot be saved")
    shared.sort(key=lambda piece: (-piece.tensor.nbytes, piece.name))
    loads = [0] * world_size
    for piece in shared:
        writer = loads.index(min(loads))
        loads[writer] += max(1, piece.tensor.nbytes)
        if writer == rank:
            mine.append(piece)
    text = json.dumps([(piece.name, piece.global_shape, DTYPE_NAMES[piece.tensor.dtype]) for piece in shared])
    file = f"rank-{rank:05d}.safetensors"
    pieces = tuple(_placed(mine))
    return Plan(
        file,
        pieces,
        _header(pieces),
        sum(piece.tensor.nbytes for piece in pieces),
        json.dumps(_tensors(pieces, file)).encode(),
        hashlib.sha256(text.encode()).hexdigest(),
    )


def _placed(pieces: Iterable[Piece]) -> Iterable[Piece]:
    """safetensors has no padding: elements stay aligned if the widest dtypes come first."""
    offset = 0
    for piece in sorted(pieces, key=lambda piece: (-piece.tensor.element_size(), piece.key)):
        yield Piece(piece.key, piece.name, piece.tensor, piece.box, piece.global_shape, offset)
        offset += piece.tensor.nbytes


def _header(pieces: Iterable[Piece]) -> bytes:
    """The beginning of a safetensors file (https://github.com/huggingface/safetensors#format)."""
    header = {
        piece.key: {
            "dtype": DTYPE_NAMES[piece.tensor.dtype],
            "shape": list(piece.tensor.shape),
            "data_offsets": [piece.offset, piece.offset + piece.tensor.nbytes],
        }
        for piece in pieces
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _tensors(pieces: Iterable[Piece], file: str) -> dict[str, Any]:
    """As in the manifest."""
    found: dict[str, Any] = {}
    for piece in pieces:
        dtype = DTYPE_NAMES[piece.tensor.dtype]
        entry = found.setdefault(
            piece.name, {"dtype": dtype, "shape": list(piece.global_shape), "chunks": []}
        )
        box = piece.box
        entry["chunks"].append(
            {"file": file, "key": piece.key, "offset": list(box.offset), "shape": list(box.shape)}
        )
    return found
