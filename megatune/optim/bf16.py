"""AdamW on matrices that are bf16 and have no fp32 masters (`ops.adamw_bf16_`).

What an element is rounded by is a function of the run's seed, the parameter's name, the step and the element's place in
the whole parameter. So each shard must say which elements it holds: `places`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatune.config.schema import OptimConfig
from megatune.ops.optim_bf16 import MOST_OF_ROWS, adamw_bf16_, parameter_key
from megatune.optim.rules import Elementwise, Run
from megatune.parallel.shard import Box
from megatune.parallel.zero import Master


@dataclass(frozen=True)
class Place:
    """Elements [start, start + numel) of a run: element i of them is element first + i // width * stride + i % width of
    the parameter that `key` is of."""

    start: int
    numel: int
    key: int
    first: int
    width: int
    stride: int

    @property
    def is_line(self) -> bool:
        return self.width >= self.numel


def places(master: Master, key: int, origin: int) -> list[Place]:
    """Where a master's elements stand in the parameter, padding left out. `origin`: the storage's element that is the
    run's first."""
    found: list[Place] = []
    for box, view in master.parts(master.tensor).parts:
        for part, tensor in _split(master.spec.shape, box, view):
            width, stride = _rows(master.spec.shape, part)
            strides = _strides(master.spec.shape)
            first = sum(at * step for at, step in zip(part.offset, strides, strict=True))
            one = Place(tensor.storage_offset() - origin, part.numel, key, first, width, stride)
            last = found[-1] if found else None
            if last is not None and last.is_line and one.is_line and _follows(last, one):
                numel = last.numel + one.numel
                found[-1] = replace(last, numel=numel, width=numel, stride=numel)
            else:
                found.append(one)
    return found


def _follows(before: Place, after: Place) -> bool:
    """Whether a line goes on in the next one, here and in the parameter."""
    return (after.start - before.start, after.first - before.first) == (before.numel, before.numel)


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _rows(shape: Sequence[int], box: Box) -> tuple[int, int] | None:
    """(width, stride) of a box's elements in the tensor of this shape; None where they are not equally far apart."""
    inner = len(shape) - 1
    while inner > 0 and box.shape[inner] == shape[inner]:
        inner -= 1
    width = math.prod(box.shape[inner:])
    outer = [dim for dim in range(inner) if box.shape[dim] > 1]
    if not outer:
        return width, width
    if any(box.shape[dim] != shape[dim] for dim in range(outer[0] + 1, outer[-1] + 1)):
        return None
    return width, _strides(shape)[outer[-1]]


def _split(shape: Sequence[int], box: Box, view: Tensor) -> Iterator[tuple[Box, Tensor]]:
    """Parts of a box and its view that are contiguous in memory and in equal rows of the parameter."""
    rows = _rows(shape, box)
    if rows is not None and view.is_contiguous() and (rows[0] == box.numel or box.numel < MOST_OF_ROWS):
        yield box, view
        return
    dim = next(dim for dim, length in enumerate(box.shape) if length > 1)
    for at in range(box.shape[dim]):
        part = Box(
            tuple(o + at * (d == dim) for d, o in enumerate(box.offset)),
            tuple(1 if d == dim else n for d, n in enumerate(box.shape)),
        )
        yield from _split(shape, part, view.narrow(dim, at, 1))


class AdamWBf16(Elementwise):
    """The masters are the weights. Moments in fp32."""

    slots = ("exp_avg", "exp_avg_sq")

    def __init__(self, config: OptimConfig, seed: int) -> None:
        super().__init__(config)
        self._seed = seed
        self._places: dict[int, list[Place]] = {}

    def states(self, run: Run) -> dict[str, Tensor]:
        origin = run.tensor.storage_offset()
        self._places[id(run)] = [
            place
            for master in run.members
            for place in places(master, parameter_key(self._seed, master.name), origin)
        ]
        return {slot: torch.zeros_like(run.tensor, dtype=torch.float32) for slot in self.slots}

    def update(self, runs: Sequence[Run], scale: Tensor, lr: float, step: int) -> None:
        held = [(run, place) for run in runs for place in self._places[id(run)]]
        grads = {id(run): run.gradient() for run in runs}
        lists: list[list[Tensor]] = [[], [], [], []]
        for run, place in held:
            here = slice(place.start, place.start + place.numel)
            of_run = (run.tensor, *(run.slots[slot] for slot in self.slots), grads[id(run)])
            for into, tensor in zip(lists, of_run, strict=True):
                into.append(tensor[here])
        adamw_bf16_(
            *lists,
            scale=scale,
            decays=[run.decay for run, _ in held],
            lr=lr,
            betas=self.betas,
            eps=self.config.eps,
            step=step,
            keys=[place.key for _, place in held],
            firsts=[place.first for _, place in held],
            widths=[place.width for _, place in held],
            strides=[place.stride for _, place in held],
        )
