"""The linear layer and the embedding that every model is built from; tensor parallelism happens in here."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatune.parallel.shard import Fused


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

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.shard}, bias={self.bias is not None}"


class Embedding(nn.Module):
    """Rows of `weight` [rows, H] by index: int64 [T] -> [T, H], in the weight's dtype."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} x {self.weight.shape[1]}"
