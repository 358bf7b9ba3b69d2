"""How an optimizer updates a run of masters: what it keeps for them, and one step.

| optimizer | states (`optim/<slot>/<parameter>` in checkpoints) |
| --- | --- |
| adamw | exp_avg, exp_avg_sq: fp32, shaped as the parameter |
| lion | exp_avg: fp32, shaped as the parameter |
| adamw_8bit, matrices of 4096 elements and more | exp_avg_code, exp_avg_sq_code: uint8, shaped as the parameter; \
exp_avg_scale, exp_avg_sq_scale: fp32 [ceil(elements / 256)], one for each 256 elements in row-major order |
| adamw_bf16 | as adamw; the masters of matrices are bf16 |
| muon, matrices of layers | momentum: fp32, shaped as the parameter |
| adamw_8bit and muon, other parameters | as adamw |
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatune.config.schema import OptimConfig
from megatune.errors import ConfigError
from megatune.ops.optim import BLOCK, adamw_, adamw_8bit_, lion_
from megatune.parallel import Master, Parts
from megatune.parallel.buckets import is_matrix
from megatune.parallel.shard import Cut, ShardSpec, local_shape, parts_of_flat

SMALLEST_8BIT = 4096  # elements: below it 8-bit states save nothing worth their noise


@dataclass
class Run:
    """Masters that are updated as one. `tensor`: flat [n]. `grad`: the gradient of all, always in the same place; None
    for one master that stands alone, whose gradient may be another tensor in every step. `slots`: states by name.
    `weight`: where the new masters go in the compute dtype too, in the step that is being made; None: nowhere."""

    tensor: Tensor
    grad: Tensor | None
    decay: float
    counts: bool
    members: list[Master] = field(default_factory=list)
    slots: dict[str, Tensor] = field(default_factory=dict)
    weight: Tensor | None = None

    def gradient(self) -> Tensor:
        """Flat [n]; zeros where there is none."""
        grad = self.members[0].grad if self.grad is None else self.grad
        return torch.zeros_like(self.tensor) if grad is None else grad.contiguous().view(-1)

    def take_weight(self) -> None:
        """Ask the bucket for `weight`."""
        first = self.members[0]
        if first.rounded is not None:
            self.weight = first.rounded(first.run[2], self.tensor.numel())

    def places(self) -> Iterator[tuple[Master, int, int]]:
        """(master, its first element of the run, elements)."""
        start = 0
        for master in self.members:
            yield master, start, master.tensor.numel()
            start += master.tensor.numel()


class Rule(Protocol):
    """`slots`: names of the states that it keeps, which take `width` bytes an element of the parameter."""

    slots: tuple[str, ...]

    @property
    def width(self) -> float: ...

    def states(self, run: Run) -> dict[str, Tensor]:
        """Fresh states of a run."""
        ...

    def parts(self, master: Master, slot: str, run: Run | None, start: int) -> Parts:
        """A master's part of a state, which begins at element `start` of `run`; no run: its shard is empty."""
        ...

    def part(self, run: Run, start: int, stop: int) -> dict[str, Tensor]:
        """The states of elements [start, stop) of a run; `start` is a multiple of `BLOCK`."""
        ...

    def update(self, runs: Sequence[Run], scale: Tensor, lr: float, step: int) -> None:
        """Step number `step`, from 1 on; gradients are multiplied by `scale` (one fp32) first. Fills the runs' `weight`
        where they have one."""
        ...


class Elementwise:
    """States shaped as the parameters, in fp32."""

    slots: tuple[str, ...]

    @property
    def width(self) -> float:
        return 4.0 * len(self.slots)

    def __init__(self, config: OptimConfig) -> None:
        self.config = config
        self.betas = (config.beta1, config.beta2)

    def states(self, run: Run) -> dict[str, Tensor]:
        return {slot: torch.zeros_like(run.tensor) for slot in self.slots}

    def parts(self, master: Master, slot: str, run: Run | None, start: int) -> Parts:
        if run is None:
            return master.parts(master.tensor)  # as empty as the state
        here = run.slots[slot][start : start + master.tensor.numel()]
        return master.parts(here.view(master.tensor.shape))

    def part(self, run: Run, start: int, stop: int) -> dict[str, Tensor]:
        return {slot: state[start:stop] for slot, state in run.slots.items()}


class AdamW(Elementwise):
    slots = ("exp_avg", "exp_avg_sq")

    def update(self, runs: Sequence[Run], scale: Tensor, lr: float, step: int) -> None:
        adamw_(
            *_lists(runs, self.slots),
            scale=scale,
            decays=[run.decay for run in runs],
            lr=lr,
            betas=self.betas,
            eps=self.config.eps,
            step=step,
            weights=_weights(runs),
        )


class Lion(Elementwise):
    slots = ("exp_avg",)

    def update(self, runs: Sequence[Run], scale: Tensor, lr: float, step: int) -> None:
        decays = [run.decay for run in runs]
        lists = _lists(runs, self.slots)
        lion_(*lists, scale=scale, decays=decays, lr=lr, betas=self.betas, weights=_weights(runs))


class AdamW8bit:
    """Moments in blocks of 256 elements, which no process may hold a part of only: whatever the layout, the blocks are
    the same."""

    slots = ("exp_avg_code", "exp_avg_scale", "exp_avg_sq_code", "exp_avg_sq_scale")
    width = 2 * (1 + 4 / BLOCK)

    def __init__(self, config: OptimConfig) -> None:
        self.config = config

    def states(self, run: Run) -> dict[str, Tensor]:
        for master in run.members:
            _check_blocks(master)
        blocks = -(-run.tensor.numel() // BLOCK)
        # Codes whose value is 0: they are in the middle of the signed ones, and the first of the others.
        return {
            "exp_avg_code": torch.full_like(run.tensor, 127, dtype=torch.uint8),
            "exp_avg_scale": run.tensor.new_zeros(blocks),
            "exp_avg_sq_code": torch.zeros_like(run.tensor, dtype=torch.uint8),
            "exp_avg_sq_scale": run.tensor.new_zeros(blocks),
        }

    def parts(self, master: Master, slot: str, run: Run | None, start: int) -> Parts:
        numel = master.tensor.numel()
        if slot.endswith("code"):
            if run is None:
                return master.parts(master.tensor.to(torch.uint8))
            return master.parts(run.slots[slot][start : start + numel].view(master.tensor.shape))
        spec = ShardSpec(master.name, (-(-math.prod(master.spec.shape) // BLOCK),))
        if run is None:
            return Parts(spec.shape, (), master.counts)
        first = -(-start // BLOCK)
        here = run.slots[slot][first : first + -(-numel // BLOCK)]
        return parts_of_flat(spec, Cut(), here, _first_element(master) // BLOCK, master.counts)

    def part(self, run: Run, start: int, stop: int) -> dict[str, Tensor]:
        blocks = slice(start // BLOCK, -(-stop // BLOCK))
        return {
            slot: state[start:stop] if slot.endswith("code") else state[blocks]
            for slot, state in run.slots.items()
        }

    def update(self, runs: Sequence[Run], scale: Tensor, lr: float, step: int) -> None:
        adamw_8bit_(
            *_lists(runs, self.slots),
            scale=scale,
            decays=[run.decay for run in runs],
            lr=lr,
            betas=(self.config.beta1, self.config.beta2),
            eps=self.config.eps,
            step=step,
            weights=_weights(runs),
        )


def is_8bit(spec: ShardSpec) -> bool:
    return is_matrix(spec) and math.prod(spec.shape) >= SMALLEST_8BIT


def _lists(runs: Sequence[Run], slots: Sequence[str]) -> list[list[Tensor]]:
    states = [[run.slots[slot] for run in runs] for slot in slots]
    return [[run.tensor for run in runs], *states, [run.gradient() for run in runs]]


def _weights(runs: Sequence[Run]) -> list[Tensor]:
    return [run.tensor.new_empty(0) if run.weight is None else run.weight for run in runs]


def _first_element(master: Master) -> int:
    """Where a master begins in the flattened parameter."""
    if master.at is None:
        return master.start
    return master.at.offset[0] * math.prod(master.spec.shape[1:])


def _check_blocks(master: Master) -> None:
    """ConfigError where a block of 256 elements would be held by two processes."""
    shape = master.spec.shape
    start, stop = _first_element(master), _first_element(master) + master.tensor.numel()
    is_cut = local_shape(master.spec, master.cut) != shape
    if master.at is not None:
        is_cut = is_cut or master.at.shape[1:] != shape[1:]
    ends = stop % BLOCK == 0 or stop >= math.prod(shape)
    if is_cut or start % BLOCK or not ends:
        raise ConfigError(
            f"optim.name: adamw_8bit keeps one scale for {BLOCK} elements, and this layout cuts {master.name} "
            f"{list(shape)} within them: use parallel.zero 0, 1 or 2 without tensor or expert parallelism, or "
            "optim.name: adamw."
        )
