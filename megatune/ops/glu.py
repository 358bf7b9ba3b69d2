"""Gated linear unit (arXiv:2002.05202) on an interleaved gate and up projection, and GPT-OSS's clamped one."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatune.ops.checks import accumulate_dtype, floating
from megatune.ops.registry import Body, add_op, compiled_body, cpu_body, cuda_body, define, fuse

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


def _unpack(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 pairs (gate, up) seen as int32 -> both in fp32. A kernel then reads and writes whole words."""
    return (pairs << 16).view(torch.float32), (pairs & -65536).view(torch.float32)


def _pack(gate: Tensor, up: Tensor) -> Tensor:
    low, high = (x.to(torch.bfloat16).view(torch.int16).to(torch.int32) for x in (gate, up))
    return (low & 0xFFFF) | (high << 16)


def _pairs(pairs: Tensor, activation: int) -> Tensor:
    gate, up = _unpack(pairs)
    return (_activate(gate, activation)[0] * up).to(torch.bfloat16)


def _pairs_backward(grad: Tensor, pairs: Tensor, activation: int) -> Tensor:
    gate, up = _unpack(pairs)
    value, slope = _activate(gate, activation)
    return _pack(grad.float() * up * slope, grad.float() * value)


_FUSED, _FUSED_BACKWARD = fuse(_reference), fuse(_reference_backward)
_FUSED_PAIRS, _FUSED_PAIRS_BACKWARD = fuse(_pairs), fuse(_pairs_backward)


def _in_pairs(gate_up: Tensor) -> bool:
    """Whether the tensor can be seen as int32: bf16, and each row begins on a whole word."""
    words = (
        gate_up.dtype == torch.bfloat16 and gate_up.stride(0) % 2 == 0 and gate_up.storage_offset() % 2 == 0
    )
    return words and not torch.compiler.is_compiling()


def _compiled(gate_up: Tensor, activation: int) -> Tensor:
    if _in_pairs(gate_up):
        return _FUSED_PAIRS(gate_up.view(torch.int32), activation)
    return _FUSED(gate_up, activation)


def _compiled_backward(grad: Tensor, gate_up: Tensor, activation: int) -> Tensor:
    if _in_pairs(gate_up):
        return _FUSED_PAIRS_BACKWARD(grad, gate_up.view(torch.int32), activation).view(torch.bfloat16)
    return _FUSED_BACKWARD(grad, gate_up, activation)


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
        cuda_body(_FORWARD, _BACKWARD),
        compiled_body(_compiled, _compiled_backward),
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


# ---- GPT-OSS's gate

_LIMIT, _SHARPNESS = 7.0, 1.702


def _clamped(gate_up: Tensor) -> Tensor:
    wide = accumulate_dtype(gate_up.dtype)
    gate = gate_up[..., 0::2].to(wide).clamp(max=_LIMIT)
    up = gate_up[..., 1::2].to(wide).clamp(-_LIMIT, _LIMIT)
    return ((up + 1) * gate * torch.sigmoid(_SHARPNESS * gate)).to(gate_up.dtype)


def _clamped_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    wide = accumulate_dtype(gate_up.dtype)
    gate, up, grad = gate_up[..., 0::2].to(wide), gate_up[..., 1::2].to(wide), grad.to(wide)
    gate_passes, up_passes = gate <= _LIMIT, up.abs() <= _LIMIT
    gate, up = gate.clamp(max=_LIMIT), up.clamp(-_LIMIT, _LIMIT)
    sigmoid = torch.sigmoid(_SHARPNESS * gate)
    slope = sigmoid * (1 + _SHARPNESS * gate * (1 - sigmoid))
    pair = (grad * (up + 1) * slope * gate_passes, grad * gate * sigmoid * up_passes)
    return torch.stack(pair, -1).flatten(-2).to(gate_up.dtype)


def _fake_clamped(gate_up: Tensor) -> Tensor:
    return _fake(gate_up, 0)


def _fake_clamped_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    return _fake_backward(grad, gate_up, 0)


_CLAMPED = add_op(
    "clamped_glu",
    [
        cuda_body(
            define("clamped_glu(Tensor gate_up) -> Tensor", _clamped, _fake_clamped),
            define(
                "clamped_glu_backward(Tensor grad, Tensor gate_up) -> Tensor",
                _clamped_backward,
                _fake_clamped_backward,
            ),
        ),
        compiled_body(fuse(_clamped), fuse(_clamped_backward)),
        Body("reference", (_clamped, _clamped_backward)),
    ],
)


class _ClampedGlu(torch.autograd.Function):
    """gate_up [R, 2I] -> [R, I]. Saved: gate_up."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _CLAMPED.pick(gate_up.device.type, gate_up.dtype).run[0](gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return _CLAMPED.pick(gate_up.device.type, gate_up.dtype).run[1](grad.contiguous(), gate_up)


def clamped_glu(gate_up: Tensor) -> Tensor:
    """gate_up [R, 2I] interleaved -> (up' + 1) * gate' * sigmoid(1.702 gate') [R, I] with gate' = min(gate, 7) and
    up' = up held within [-7, 7], as in GPT-OSS; computed in fp32. ValueError for another shape or dtype."""
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"clamped_glu: gate_up {tuple(gate_up.shape)} must be [R, 2I]")
    floating("clamped_glu", gate_up=gate_up)
    return _ClampedGlu.apply(gate_up if gate_up.stride(1) == 1 else gate_up.contiguous())
