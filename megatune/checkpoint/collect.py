"""Tensors that several processes hold in parts, whole on rank 0, one at a time.

Rank 0 asks for what it needs when it needs it, and the others answer until it has enough: no process but rank 0 has to
know the order, nobody holds more than one tensor, and where rank 0 fails it simply asks for nothing more. All of it
goes over the host's process group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatune.checkpoint.boxes import tile_exactly, within
from megatune.checkpoint.manifest import DTYPE_NAMES
from megatune.errors import CheckpointError
from megatune.parallel.shard import Box, Parts

# A process that waits for longer than the process group's timeout would end the run; so it hears something before.
QUIET_SECONDS = 20.0
_DTYPES = tuple(DTYPE_NAMES)
_END, _NOTHING = -1, -2

# Of each name that a process writes: dtype (an index), and boxes of the global tensor.
Offer = dict[str, tuple[int, tuple[Box, ...]]]


class Collected:
    """All processes' tensors by name, on rank 0. Other processes must be in `_serve`."""

    def __init__(self, weights: Mapping[str, Parts], offers: list[Offer]) -> None:
        self._weights = weights
        self._offers = offers
        self._indices = [{name: index for index, name in enumerate(sorted(offer))} for offer in offers]
        self._holders: dict[str, list[int]] = {}
        for rank, offer in enumerate(offers):
            for name in offer:
                self._holders.setdefault(name, []).append(rank)
        self._spoke = time.monotonic()

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor that is there."""
        return _DTYPES[self._offers[self._holders[name][0]][name][0]]

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError unless each of these tensors is there, every element once."""
        for name, shape in shapes.items():
            boxes = [box for rank in self._holders.get(name, ()) for box in self._offers[rank][name][1]]
            if any(len(box.shape) != len(shape) for box in boxes) or not tile_exactly(boxes, shape):
                raise CheckpointError(f"{name}: the processes' parts do not cover {list(shape)} exactly once")

    @torch.no_grad()
    def pull(self, name: str, box: Box, dtype: torch.dtype | None = None) -> Tensor:
        """The elements `box` of a tensor, on the host, in `dtype` (default: its own). May be the live tensor."""
        dtype = dtype or self.dtype(name)
        ranks = [
            rank
            for rank in self._holders[name]
            if any(held & box is not None for held in self._offers[rank][name][1])
        ]
        others = [rank for rank in ranks if rank]
        for rank in others:
            self._say(rank, self._indices[rank][name], _DTYPES.index(dtype), box)
        parts = self._weights[name].parts if 0 in ranks else ()
        if len(parts) == 1 and parts[0][0] & box == box:
            held, tensor = parts[0]
            self._keep_waiting()
            return within(box, held).of(tensor).to(dtype).cpu()
        out = torch.empty(box.shape, dtype=dtype)
        for held, tensor in parts:
            if (common := held & box) is not None:
                within(common, box).of(out).copy_(within(common, held).of(tensor))
        for rank in others:
            commons = [common for held in self._offers[rank][name][1] if (common := held & box) is not None]
            packed = torch.empty(sum(common.numel for common in commons), dtype=dtype)
            dist.recv(packed.view(torch.uint8), src=rank)
            for common, values in zip(
                commons, packed.split([common.numel for common in commons]), strict=True
            ):
                within(common, box).of(out).copy_(values.view(common.shape))
        self._keep_waiting()
        return out

    def end(self) -> None:
        """Let the other processes go on."""
        for rank in range(1, len(self._offers)):
            self._say(rank, _END)

    def _keep_waiting(self) -> None:
        if time.monotonic() - self._spoke >= QUIET_SECONDS:
            for rank in range(1, len(self._offers)):
                self._say(rank, _NOTHING)
            self._spoke = time.monotonic()

    @staticmethod
    def _say(rank: int, index: int, dtype: int = 0, box: Box | None = None) -> None:
        words = [index, dtype]
        if box is not None:
            words += [len(box.shape), *box.offset, *box.shape]
        message = torch.zeros(_WORDS, dtype=torch.int64)
        message[: len(words)] = torch.tensor(words)
        dist.send(message, dst=rank)


_WORDS = 3 + 2 * 8  # a request: which, dtype, dimensions, offset, shape


def on_main(weights: Mapping[str, Parts], folder: Path, work: Callable[[Collected], None]) -> None:
    """`work` on rank 0, which writes `folder`, with all processes' tensors at hand; every process calls it. Raises the
    same CheckpointError on all of them where rank 0 cannot write."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    offer = offer_of(weights)
    offers: list[Offer] = [offer] * world_size
    if world_size > 1:
        dist.gather_object(offer, offers if rank == 0 else None, dst=0)
    if rank:
        _serve(weights, sorted(offer))
        _agree(None)
        return
    collected, failure, error = Collected(weights, offers), None, None
    try:
        work(collected)
    except Exception as problem:
        failure, error = problem, _sentence(problem, folder)
    collected.end()
    if failure is not None and not isinstance(failure, OSError | CheckpointError):
        _tell(error)
        raise failure
    _agree(error)


def offer_of(weights: Mapping[str, Parts]) -> Offer:
    """What a process can send."""
    return {
        name: (_DTYPES.index(parts.parts[0][1].dtype), tuple(box for box, _ in parts.parts))
        for name, parts in weights.items()
        if parts.writes and parts.parts
    }


@torch.no_grad()
def _serve(weights: Mapping[str, Parts], names: list[str]) -> None:
    """Answer rank 0 until it needs nothing more."""
    message = torch.empty(_WORDS, dtype=torch.int64)
    while True:
        dist.recv(message, src=0)
        index, dtype, dims, *rest = message.tolist()
        if index == _END:
            return
        if index == _NOTHING:
            continue
        box = Box(tuple(rest[:dims]), tuple(rest[dims : 2 * dims]))
        blocks = [
            within(common, held).of(tensor).to(_DTYPES[dtype]).reshape(-1)
            for held, tensor in weights[names[index]].parts
            if (common := held & box) is not None
        ]
        dist.send(torch.cat(blocks).cpu().view(torch.uint8), dst=0)


def _tell(error: str | None) -> str | None:
    box = [error]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def _agree(error: str | None) -> None:
    found = _tell(error)
    if found is not None:
        raise CheckpointError(found)


def _sentence(problem: Exception, folder: Path) -> str:
    if isinstance(problem, OSError):
        return f"{folder}: cannot be written ({problem.strerror or problem})"
    return str(problem) if isinstance(problem, CheckpointError) else f"{folder}: {problem!r}"
