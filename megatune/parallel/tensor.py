"""The linear layer and the embedding that every model is built from; tensor parallelism happens in here.

Between them each process of a tensor parallel line has its slice of the tokens: x is [T / n, H]. Inside `whole_tokens`
(generation, where a step may be a single token) every process has all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatune import ops
from megatune.ops import Segments
from megatune.ops.glu import Activation
from megatune.parallel import linear
from megatune.parallel.collectives import gather, gather_rows, scatter_sum, sum_
from megatune.parallel.linear import LowRank
from megatune.parallel.shard import Fused, ShardSpec, local_shape, vocab_rows
from megatune.parallel.world import Axis, World

_whole_tokens = False


@contextmanager
def whole_tokens() -> Iterator[None]:
    """Forward passes without autograd in which every tensor parallel process has all tokens, whose number need not be
    a multiple of anything: activations are [T, H], row products are all-reduced."""
    global _whole_tokens
    before, _whole_tokens = _whole_tokens, True
    try:
        with torch.no_grad():
            yield
    finally:
        _whole_tokens = before


def tokens_are_whole(axis: Axis) -> bool:
    """Whether this process has all tokens between the layers, and not its slice of them."""
    return axis.size == 1 or _whole_tokens


def gather_tokens(x: Tensor, axis: Axis) -> Tensor:
    """[T / n, ..] -> [T, ..]; the gradient is summed over the axis and scattered."""
    return x if tokens_are_whole(axis) else gather(x, axis)


def scatter_sum_tokens(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums [T, ..] -> this process's tokens [T / n, ..] of their sum; the gradient is gathered."""
    if axis.size > 1 and _whole_tokens:
        return sum_(x.contiguous(), axis)
    return scatter_sum(x, axis)


def own_tokens(x: Tensor, axis: Axis) -> Tensor:
    """Of something that all have, [T, ..], what belongs to this process's tokens: [T / n, ..]. No gradient."""
    if tokens_are_whole(axis):
        return x
    rows = x.shape[0] // axis.size
    return x.narrow(0, axis.rank * rows, rows)


def gather_columns(x: Tensor, total: int, axis: Axis) -> Tensor:
    """Columns cut as a vocabulary of `total`: [T, here] -> [T, total]. Without autograd."""
    if axis.size == 1:
        return x
    widths = [vocab_rows(total, rank, axis.size)[1] for rank in range(axis.size)]
    padded = F.pad(x.detach(), (0, max(widths) - x.shape[1]))
    blocks = gather_rows(padded, axis)[0].view(axis.size, *padded.shape)
    return torch.cat([block[:, :width] for block, width in zip(blocks, widths, strict=True)], 1)


class Linear(nn.Module):
    """y = x W^T + b, in the weight's own dtype; `in_features` and `out_features` of the whole layer.

    `shard`: which way tensor parallelism cuts the weight [out, in]: "column" its outputs (x [T / n, in] -> [T, out /
    n]), "row" its inputs (x [T, in / n] -> [T / n, out]), "replicated" not at all (x [T / n, in] -> [T / n, out]).
    `fused`: order of the rows where the weight joins several matrices; `local_fused`: of those that are here.
    `vocab`: the outputs count the vocabulary. `adapter`: None, or a module called as `adapter(x, self, segments)` in
    place of the plain product, which adds its change by `self.product`; its parameters live below this module's name.
    `fp8`: None, or how the product is computed in 8 bits: without an adapter, and where nothing is cut.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        shard: Literal["column", "row", "replicated"],
        fused: Fused | None = None,
        vocab: bool = False,
        world: World | None = None,
    ) -> None:
        super().__init__()
        world = world or World.alone()
        self.in_features, self.out_features = in_features, out_features
        self.shard: Literal["column", "row", "replicated"] = shard
        self.axis, self.cut = world.tp, world.cut
        self.overlap = world.config.overlap
        self.splits = world.config.schedule in ("zb-h1", "zbv")
        self.fused = fused
        self.local_fused = None if fused is None else fused.slice(self.axis.rank, self.axis.size)[0]
        dim = {"column": 0, "row": 1, "replicated": None}[shard]
        weight = ShardSpec("weight", (out_features, in_features), dim, fused, vocab=vocab)
        self.weight = nn.Parameter(torch.empty(local_shape(weight, self.cut)))
        shape = self.weight.shape[:1]
        self.register_parameter("bias", nn.Parameter(torch.empty(shape)) if bias else None)
        self.register_module("adapter", None)
        self.fp8: ops.Fp8Recipe | None = None

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        """`segments`: of the tokens, for an adapter whose dropout depends on them."""
        if self.adapter is not None:
            return self.adapter(x, self, segments)
        return self.product(x)

    def product(self, x: Tensor, change: LowRank | None = None) -> Tensor:
        """x (W + change)^T + b. `self.weight` may also be an `ops.FrozenWeight` of its shape (`models.quantise`)."""
        if self.fp8 is not None:
            return ops.fp8_linear(x, self.weight, self.bias, self.fp8)
        if self.axis.size == 1 or self.shard == "replicated":
            return linear.product(x, self.weight, self.bias, change, self.splits)
        if _whole_tokens:
            return self._whole(x, change)
        if self.shard == "column":
            return linear.column(x, self.weight, self.bias, change, self.axis, self.overlap)
        return linear.row(x, self.weight, self.bias, change, self.axis, self.splits, self.overlap)

    def of_norm(self, x: Tensor, scale: Tensor, eps: float, offset: float) -> Tensor:
        """self(ops.rms_norm(x, scale, eps, offset)) for a layer with `fp8`: what stands between is in 8 bits only."""
        norm = {"offset": offset, "recipe": self.fp8}
        return ops.fp8_norm_linear(x, scale, eps, self.weight, self.bias, **norm)

    def of_sum_norm(
        self, x: Tensor, residual: Tensor, scale: Tensor, eps: float, offset: float
    ) -> tuple[Tensor, Tensor]:
        """(x + residual, `of_norm` of it)"""
        norm = {"offset": offset, "recipe": self.fp8}
        return ops.fp8_add_norm_linear(x, residual, scale, eps, self.weight, self.bias, **norm)

    def of_glu(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """self(ops.glu(gate_up, activation)) for a layer with `fp8`: what stands between is in 8 bits only."""
        return ops.fp8_glu_linear(gate_up, activation, self.weight, self.bias, recipe=self.fp8)

    def _whole(self, x: Tensor, change: LowRank | None) -> Tensor:
        if self.shard == "column":
            return linear.product(x, self.weight, self.bias, change, False)
        out = sum_(linear.product(x, self.weight, None, change, False), self.axis)
        return out if self.bias is None else out + self.bias

    def place(self, segments: Segments | None) -> tuple[Tensor | None, int]:
        """Where the input stands in the whole stream: (its rows, or None where they are 0, 1, ..; its first column)."""
        if self.axis.size == 1 or segments is None:
            return None if segments is None else segments.rows, 0
        if self.shard == "row":
            return segments.rows, self.axis.rank * self.weight.shape[1]
        rows = segments.rows
        if rows is None:
            rows = torch.arange(segments.tokens, device=segments.positions.device)
        return own_tokens(rows, self.axis), 0

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.shard}, bias={self.bias is not None}"


class Embedding(nn.Module):
    """Rows of `weight` [rows, H] by index, in the weight's dtype.

    `vocab`: rows count the vocabulary and are cut over the tensor parallel processes: int64 [T] -> [T / n, H]. Else
    all are here, for the tokens of this process: int64 [T / n] -> [T / n, H].
    """

    def __init__(self, rows: int, size: int, *, vocab: bool, world: World | None = None) -> None:
        super().__init__()
        self.axis = (world or World.alone()).tp if vocab else Axis("tp")
        self.rows = rows
        self.first, held = vocab_rows(rows, self.axis.rank, self.axis.size)
        self.weight = nn.Parameter(torch.empty(held, size))

    def forward(self, index: Tensor) -> Tensor:
        if self.axis.size == 1:
            return ops.embedding(index, self.weight)
        # Tokens of other processes' rows are zeros here: the sum has each token once.
        found = ops.embedding(index, self.weight, self.first, self.rows)
        return scatter_sum_tokens(found, self.axis)

    def extra_repr(self) -> str:
        return f"{self.rows} x {self.weight.shape[1]}"
