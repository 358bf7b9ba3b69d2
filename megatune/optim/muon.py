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
# The factor of several steps is computed before it is applied, where that is less work: matrices wider than this many
# times their height. All five at once would let A's rounding errors grow, by a^2 a step, to more than its eigenvalues.
WIDE, WIDE_RATIO = (2, 3), 1.5
LEAST_CUT = 4096  # rows of symmetric matrices that are computed in halves
# Root mean square of an update, that of AdamW: so both go by one learning rate (arXiv:2502.16982).
RMS = 0.2


def is_orthogonal(spec: ShardSpec) -> bool:
    """Whether Muon updates the parameter."""
    return is_matrix(spec) and spec.name.startswith("layers.") and ".router." not in spec.name


def orthogonalise(x: Tensor, scale: float = 1.0) -> Tensor:
    """[.., rows, columns] -> `scale` times nearly U V^T of its singular value decomposition U S V^T, by five
    Newton-Schulz iterations X <- P X from X / |X| on, P = a + b A + c A^2 of A = X X^T. fp64 and, on CPUs, fp32 as they
    are; on GPUs in fp16, of which the result is, too: no number here is large, and it has eight times bf16's precision.
    No autograd."""
    is_tall = x.shape[-2] > x.shape[-1]
    y = x.mT if is_tall else x  # the smaller A
    y = y.reshape(-1, *y.shape[-2:])
    norm = torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True)
    low = torch.float16 if x.is_cuda and x.dtype != torch.float64 else x.dtype
    y = torch.mul(y, (norm + 1e-7).reciprocal_(), out=torch.empty_like(y, dtype=low))
    other = torch.empty_like(y)
    parts = _parts(y.shape[-2])
    counts = WIDE if y.shape[-1] >= WIDE_RATIO * y.shape[-2] else (1,) * STEPS
    for number, count in enumerate(counts):
        factor = _factor(y, count, scale if number == len(counts) - 1 else 1.0, parts)
        for part in parts:
            torch.bmm(_rows(factor, part), y, out=other[:, part])
        y, other = other, y
    y = y.view(*x.shape[:-2], *y.shape[-2:])
    return y.mT if is_tall else y


def _parts(size: int) -> list[slice]:
    """How symmetric matrices are cut: large ones in two, small ones in pieces would not fill a GPU."""
    half = size // 2
    return [slice(0, half), slice(half, size)] if size >= LEAST_CUT else [slice(0, size)]


def _rows(x: Tensor, part: slice) -> Tensor:
    """A part's rows of symmetric x [batch, m, m], of which nothing is there below the parts on the diagonal."""
    return x[:, part] if part.start == 0 else x[:, :, part].mT


def _factor(y: Tensor, count: int, scale: float, parts: list[slice]) -> Tensor:
    """scale times what `count` iterations multiply y [batch, m, n] with: the product of their P, each of which makes
    the next A, which is P A P. [batch, m, m], symmetric, as all of these are: what is below the parts on the diagonal
    is neither computed nor read."""
    gram = y.new_empty(*y.shape[:-1], y.shape[-2])
    for part in parts:
        rest = slice(part.start, None)
        torch.bmm(y[:, part], y[:, rest].mT, out=gram[:, part, rest])
    product = None
    for step in range(count):
        times = scale if step == count - 1 else 1.0
        a, b, c = (times * number for number in COEFFICIENTS)
        factor = _multiply(gram, gram, parts, gram, b, c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        if step < count - 1:
            gram = _multiply(_multiply(gram, factor, parts), factor, parts)
        product = factor if product is None else _multiply(factor, product, parts)
    return product


def _multiply(
    left: Tensor,
    right: Tensor,
    parts: list[slice],
    added: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """beta added + alpha left right, of symmetric [batch, m, m] that commute, so that it is symmetric too."""
    out = torch.empty_like(left)
    for number, rows in enumerate(parts):
        for columns in parts[number:]:
            block = out[:, rows, columns]
            first = block if added is None else added[:, rows, columns]
            two = _rows(right, columns).mT
            torch.baddbmm(first, _rows(left, rows), two, beta=beta, alpha=alpha, out=block)
    return out


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
    found = [orthogonalise(piece, RMS * math.sqrt(max(piece.shape[-2:]))) for piece in pieces(spec, momentum)]
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
