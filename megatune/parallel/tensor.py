"""The linear layer and the embedding that every model is built from; tensor parallelism happens in here."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatune.parallel.shard import Fused, ShardSpec


class Linear(nn.Module):
    """y = x W^T + b. x [T, in] -> [T, out]; `weight` [out, in], `bias` [out] or None, in the weight's own dtype.

    `shard`: which way tensor parallelism cuts the weight: "column" its outputs (dim 0), "row" its inputs (dim 1).
    `fused`: order of the rows where the weight joins several matrices. `adapter`: None, or a module called as
    `adapter(x, self)` in place of the plain product; its parameters live below this module's name.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        shard: Literal["column", "row"],
        fused: Fused | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.shard: Literal["column", "row"] = shard
        self.fused = fused
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)
        self.register_module("adapter", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.adapter is not None:
            return self.adapter(x, self)
        return F.linear(x, self.weight, self.bias)

    def shard_specs(self, name: str) -> dict[str, ShardSpec]:
        """Specs of `{name}.weight` and `{name}.bias`. A row-parallel bias is added after the sum over ranks, where
        each rank holds a slice of the tokens (sequence parallelism): its gradient is a partial sum."""
        column = self.shard == "column"
        weight = f"{name}.weight"
        specs = {weight: ShardSpec(weight, tuple(self.weight.shape), 0 if column else 1, self.fused)}
        if self.bias is not None:
            bias = f"{name}.bias"
            specs[bias] = ShardSpec(bias, (self.out_features,), 0 if column else None, self.fused, not column)
        return specs

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.shard}, bias={self.bias is not None}"


class Embedding(nn.Module):
    """Rows of `weight` [rows, H] by index: int64 [T] -> [T, H]. Tensor parallelism cuts the rows when `sharded`."""

    def __init__(self, rows: int, size: int, *, sharded: bool = True) -> None:
        super().__init__()
        self.sharded = sharded
        self.weight = nn.Parameter(torch.empty(rows, size))

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)

    def shard_specs(self, name: str) -> dict[str, ShardSpec]:
        """Spec of `{name}.weight`; a replicated table sees a slice of the tokens: its gradient is a partial sum."""
        weight = f"{name}.weight"
        dim = 0 if self.sharded else None
        return {weight: ShardSpec(weight, tuple(self.weight.shape), dim, partial=not self.sharded)}

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} x {self.weight.shape[1]}"
