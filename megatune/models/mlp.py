"""The feed-forward block: gated (gate and up projection in one matrix) or plain."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatune import ops
from megatune.models.spec import DecoderSpec
from megatune.parallel.tensor import Linear

_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


class GatedMLP(nn.Module):
    """x [T, H] -> down(activation(gate(x)) * up(x)) [T, H]."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.activation = spec.activation
        fused = spec.gate_up
        self.gate_up = Linear(spec.hidden_size, fused.rows, spec.mlp_bias, shard="column", fused=fused)
        self.down = Linear(spec.mlp_size, spec.hidden_size, spec.mlp_bias, shard="row")

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ops.glu(self.gate_up(x), self.activation))


class MLP(nn.Module):
    """x [T, H] -> down(activation(up(x))) [T, H]."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.activation = spec.activation
        self.up = Linear(spec.hidden_size, spec.mlp_size, spec.mlp_bias, shard="column")
        self.down = Linear(spec.mlp_size, spec.hidden_size, spec.mlp_bias, shard="row")

    def forward(self, x: Tensor) -> Tensor:
        return self.down(_ACTIVATIONS[self.activation](self.up(x)))
