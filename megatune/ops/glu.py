"""Gated linear unit (arXiv:2002.05202) on an interleaved gate and up projection."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from megatune.ops.norm import accumulate_dtype

Activation = Literal["silu", "gelu", "gelu_tanh"]
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def glu(gate_up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up.

    gate_up [T, 2I] interleaved (gate0, up0, gate1, up1, ..) -> [T, I] of the same dtype; computed in fp32.
    ValueError for an odd last dimension or an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"glu: activation is {activation!r}, must be one of {', '.join(ACTIVATIONS)}")
    if gate_up.shape[-1] % 2:
        raise ValueError(f"glu: gate_up must have an even last dimension, got {tuple(gate_up.shape)}")
    wide = accumulate_dtype(gate_up.dtype)
    gate, up = gate_up[..., 0::2].to(wide), gate_up[..., 1::2].to(wide)
    return (ACTIVATIONS[activation](gate) * up).to(gate_up.dtype)
