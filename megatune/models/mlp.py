"""The feed-forward block: gated (gate and up projection in one matrix) or plain."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatune import ops
from megatune.models.recompute import recomputed
from megatune.models.spec import DecoderSpec
from megatune.ops import Segments
from megatune.parallel.shard import Fused
from megatune.parallel.tensor import Linear
from megatune.parallel.world import World

_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


class GatedMLP(nn.Module):
    """x [T, H] -> down(activation(gate(x)) * up(x)) [T, H]. `size`: inner size; default: the model's."""

    def __init__(self, spec: DecoderSpec, world: World | None = None, size: int | None = None) -> None:
        super().__init__()
        self.activation = spec.activation
        size = spec.mlp_size if size is None else size
        fused = Fused(spec.gate_up.parts, size)
        self.gate_up = Linear(
            spec.hidden_size, fused.rows, spec.mlp_bias, shard="column", fused=fused, world=world
        )
        self.down = Linear(size, spec.hidden_size, spec.mlp_bias, shard="row", world=world)

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        return self.from_gate_up(self.gate_up(x, segments), segments)

    def from_gate_up(self, gate_up: Tensor, segments: Segments | None = None) -> Tensor:
        """What follows the first projection."""
        if self.down.fp8 is not None:
            # It keeps its input in 8 bits: less than what could be given up.
            return self.down.of_glu(gate_up, self.activation)
        return recomputed(
            lambda gate_up: ops.glu(gate_up, self.activation),
            lambda inner: self.down(inner, segments),
            gate_up,
        )


class MLP(nn.Module):
    """x [T, H] -> down(activation(up(x))) [T, H]."""

    def __init__(self, spec: DecoderSpec, world: World | None = None) -> None:
        super().__init__()
        self.activation = spec.activation
        self.up = Linear(spec.hidden_size, spec.mlp_size, spec.mlp_bias, shard="column", world=world)
        self.down = Linear(spec.mlp_size, spec.hidden_size, spec.mlp_bias, shard="row", world=world)

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        return recomputed(
            _ACTIVATIONS[self.activation], lambda inner: self.down(inner, segments), self.up(x, segments)
        )
