"""The norm of a model: root-mean-square or layer norm, as its spec says."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatune import ops
from megatune.models.spec import DecoderSpec
from megatune.ops.checks import accumulate_dtype
from megatune.parallel.collectives import copy, reduce
from megatune.parallel.world import World


class Norm(nn.Module):
    """Normalises the last dimension: x [.., size] -> like x. `weight` [size], and `bias` [size] for layer norms.

    `cut`: the world over whose tensor parallel processes the dimension is cut (RMS norms only): x [.., size / n],
    `weight` [size / n], normalised by the mean over all of it. Default: all of it is here.
    """

    def __init__(self, spec: DecoderSpec, size: int, *, cut: World | None = None) -> None:
        super().__init__()
        self.kind, self.eps, self.offset = spec.norm, spec.norm_eps, spec.norm_offset
        self.axis = None if cut is None or cut.tp.size == 1 else cut.tp
        held = size if self.axis is None else size // self.axis.size
        self.weight = nn.Parameter(torch.empty(held))
        self.register_parameter("bias", nn.Parameter(torch.empty(held)) if self.kind == "layer" else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.axis is not None:
            return self._cut_rms_norm(x)
        if self.kind == "layer":
            return ops.layer_norm(x, self.weight, self.bias, self.eps)
        return ops.rms_norm(x, self.weight, self.eps, self.offset)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(x + residual, its norm): in one pass if it is an RMS norm of all that is here."""
        if self.axis is None and self.kind == "rms":
            return ops.add_rms_norm(x, residual, self.weight, self.eps, self.offset)
        total = x + residual
        return total, self(total)

    def _cut_rms_norm(self, x: Tensor) -> Tensor:
        """As `ops.rms_norm`. Every process's output depends on the common sum of squares, so that its gradient is
        summed over them too."""
        wide = x.to(accumulate_dtype(x.dtype))
        squares = copy(reduce(wide.square().sum(-1, keepdim=True), self.axis), self.axis)
        normed = wide * torch.rsqrt(squares / (x.shape[-1] * self.axis.size) + self.eps)
        if self.offset == 0.0:
            return normed.to(x.dtype) * self.weight
        return (normed * (self.offset + self.weight.to(wide.dtype))).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.kind}, eps={self.eps}"
