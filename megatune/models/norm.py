"""The norm of a model: root-mean-square or layer norm, as its spec says."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatune import ops
from megatune.models.spec import DecoderSpec


class Norm(nn.Module):
    """Normalises the last dimension: x [.., size] -> like x. `weight` [size], and `bias` [size] for layer norms."""

    def __init__(self, spec: DecoderSpec, size: int) -> None:
        super().__init__()
        self.kind, self.eps, self.offset = spec.norm, spec.norm_eps, spec.norm_offset
        self.weight = nn.Parameter(torch.empty(size))
        self.register_parameter("bias", nn.Parameter(torch.empty(size)) if self.kind == "layer" else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            return ops.layer_norm(x, self.weight, self.bias, self.eps)
        return ops.rms_norm(x, self.weight, self.eps, self.offset)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.kind}, eps={self.eps}"
