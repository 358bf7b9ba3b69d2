"""Muon (Jordan and others 2024, kellerjordan.github.io/posts/muon): momentum made orthogonal, for the layers' matrices.

Each matrix by itself: those that a weight joins (q, k, v; gate and up), and those of each expert. Everything else
(embedding, head, router, vectors) goes by AdamW. A matrix that is sharded (ZeRO 1 and 2) is gathered and computed whole
by every process of its line, each of which keeps its own part: the result does not depend on the layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatune.config.schema import OptimConfig
from megatune.errors import ConfigError
from megatune.optim.rules import Elementwise, Run
from megatune.parallel import Master, World
from megatune.parallel.buckets import is_matrix
from megatune.parallel.collectives import gather_rows
from megatune.parallel.shard import ShardSpec, local_shape

# The quintic's coefficients, steep at zero: after five steps singular values are within about [0.7, 1.2].
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
# Root mean square of an update, that of AdamW: so both go by one learning rate (arXiv:2502.16982).
RMS = 0.2


def is_orthogonal(spec: ShardSpec) -> bool:
    """Whether Muon updates the parameter."""
    return is_matrix(spec) and spec.name.startswith("layers.") and ".router." not in spec.name


def orthogonalise(x: Tensor, steps: int = STEPS) -> Tensor:
    """[.., rows, columns] -> nearly U V^T of its singular value decomposition U S V^T, by Newton-Schulz iterations of
    X <- a X + b (X X^T) X + c (X X^T)^2 X on X / |X|. fp64 and, on CPUs, fp32 as they are; on GPUs in bf16."""
    a, b, c = COEFFICIENTS
    is_tall = x.shape[-2] > x.shape[-1]
    y = x.mT if is_tall else x  # the smaller of both products
    norm = torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True)
    y = y / (norm + 1e-7)
    y = y.bfloat16() if x.is_cuda and x.dtype != torch.float64 else y
    for _ in range(steps):
        gram = y @ y.mT
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return (y.mT if is_tall else y).to(x.dtype)


def pieces(spec: ShardSpec, x: Tensor) -> Iterator[Tensor]:
    """The matrices [.., rows, columns] that a weight [experts.., rows, columns] holds, each a copy or a view, in the
    order of `spec.fused`."""
    if spec.fused is None or spec.fused.rows != x.shape[-2]:
        yield x
        return
    grouped = x.unflatten(-2, (spec.fused.groups, spec.fused.group_rows))
    for _, start, rows in spec.fused.offsets():
        yield grouped[..., start : start + rows, :].flatten(-3, -2)


def direction(spec: ShardSpec, momentum: Tensor) -> Tensor:
    """What is taken off a weight per unit of the learning rate, for a whole local tensor."""
    found = [
        orthogonalise(piece) * (RMS * math.sqrt(max(piece.shape[-2:]))) for piece in pieces(spec, momentum)
    ]
    if len(found) == 1:
        return found[0]
    groups = spec.fused.groups
    return torch.cat([one.unflatten(-2, (groups, -1)) for one in found], -2).flatten(-3, -2)


class Muon(Elementwise):
    slots = ("momentum",)

    def __init__(self, config: OptimConfig, world: World) -> None:
        super().__init__(config)
        self._world = world

    def states(self, run: Run) -> dict[str, Tensor]:
        for master in run.members:
            _check_whole(master)
        return super().states(run)

    def update(self, runs: Sequence[Run], scale: Tensor, lr: float, step: int) -> None:
        mu = self.config.momentum
        for run in runs:
            momentum, grad = run.slots["momentum"], run.gradient() * scale
            momentum.mul_(mu).add_(grad)
            ahead = grad.add_(momentum, alpha=mu)  # Nesterov's
            spec = run.members[0].spec
            axis = self._world.efsdp if spec.expert else self._world.fsdp
            shards, rank = (axis.size, axis.rank) if self._world.config.zero else (1, 0)
            whole = ahead.view(1, -1)
            if shards > 1:
                whole, work = gather_rows(whole, axis)
                if work is not None:
                    work.wait()
            run.tensor.mul_(1 - lr * run.decay)
            for master, start, chunk in run.places():
                shape = local_shape(master.spec, master.cut)
                numel = math.prod(shape)
                matrix = whole[:, start : start + chunk].reshape(-1)[:numel].view(shape)
                taken = direction(master.spec, matrix).reshape(-1)[rank * chunk : (rank + 1) * chunk]
                run.tensor[start : start + taken.numel()].add_(taken, alpha=-lr)
            if run.weight is not None:
                run.weight.copy_(run.tensor)


def _check_whole(master: Master) -> None:
    """ConfigError where a matrix is cut in another way than into equal pieces of its elements."""
    spec = master.spec
    first = 1 if spec.expert else 0
    if master.at is not None or local_shape(spec, master.cut)[first:] != spec.shape[first:]:
        raise ConfigError(
            f"optim.name: muon needs whole matrices, and this layout cuts {master.name} {list(spec.shape)}: use "
            "parallel.zero 0, 1 or 2 without tensor parallelism, or optim.name: adamw."
        )
