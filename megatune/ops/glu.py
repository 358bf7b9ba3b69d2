"""Gated linear unit (arXiv:2002.05202) on an interleaved gate and up projection."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatune.ops.checks import accumulate_dtype, floating
from megatune.ops.registry import Body, add_op, compiled_body, cpu_body, define

Activation = Literal["silu", "gelu", "gelu_tanh"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh")  # the operator takes the index


def _reference(gate_up: Tensor, activation: int) -> Tensor:
    wide = accumulate_dtype(gate_up.dtype)
    gate, up = gate_up[..., 0::2].to(wide), gate_up[..., 1::2].to(wide)
    if activation == 0:
        gate = F.silu(gate)
    else:
        gate = F.gelu(gate, approximate="none" if activation == 1 else "tanh")
    return (gate * up).to(gate_up.dtype)


def _activate(gate: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    """(activation, its derivative)."""
    if activation == 0:
        sigmoid = torch.sigmoid(gate)
        value = gate * sigmoid
        return value, sigmoid + value * (1 - sigmoid)
    if activation == 1:
        phi = 0.5 * (1 + torch.erf(gate * math.sqrt(0.5)))
        return gate * phi, phi + gate * torch.exp(-0.5 * gate.square()) / math.sqrt(2 * math.pi)
    scale = 2 * math.sqrt(2 / math.pi)  # 0.5 * (1 + tanh(u)) = sigmoid(2 u)
    sigmoid = torch.sigmoid(scale * (gate + 0.044715 * gate**3))
    value = gate * sigmoid
    return value, sigmoid + value * (1 - sigmoid) * scale * (1 + 3 * 0.044715 * gate.square())


def _reference_backward(grad: Tensor, gate_up: Tensor, activation: int) -> Tensor:
    wide = accumulate_dtype(gate_up.dtype)
    gate, up, grad = gate_up[..., 0::2].to(wide), gate_up[..., 1::2].to(wide), grad.to(wide)
    value, slope = _activate(gate, activation)
    return torch.stack((grad * up * slope, grad * value), -1).flatten(-2).to(gate_up.dtype)


def _fake(gate_up: Tensor, activation: int) -> Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


def _fake_backward(grad: Tensor, gate_up: Tensor, activation: int) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


_FORWARD = define("glu(Tensor gate_up, int activation) -> Tensor", _reference, _fake)
_BACKWARD = define(
    "glu_backward(Tensor grad, Tensor gate_up, int activation) -> Tensor", _reference_backward, _fake_backward
)
_OP = add_op(
    "glu",
    [
        cpu_body(_FORWARD, _BACKWARD),
        compiled_body(_reference, _reference_backward),
        Body("reference", (_reference, _reference_backward)),
    ],
)


class _Glu(torch.autograd.Function):
    """gate_up [T, 2I] -> [T, I]. Saved: gate_up."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: int) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        return _OP.pick(gate_up.device.type, gate_up.dtype).run[0](gate_up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        body = _OP.pick(gate_up.device.type, gate_up.dtype)
        return body.run[1](grad.contiguous(), gate_up, ctx.activation), None


def glu(gate_up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up.

    gate_up [T, 2I] interleaved (gate0, up0, gate1, up1, ..) -> contiguous [T, I] of the same dtype; computed in fp32.
    ValueError for another shape or dtype, or an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"glu: activation is {activation!r}, must be one of {', '.join(ACTIVATIONS)}")
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"glu: gate_up {tuple(gate_up.shape)} must be [T, 2I]")
    floating("glu", gate_up=gate_up)
    return _Glu.apply(
        gate_up if gate_up.stride(1) == 1 else gate_up.contiguous(), ACTIVATIONS.index(activation)
    )
