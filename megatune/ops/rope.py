"""Rotary position embedding (RoFormer, arXiv:2104.09864), half-split as in Hugging Face."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatune.ops.checks import accumulate_dtype, floating, same_device
from megatune.ops.registry import Body, add_op, compiled_body, cpu_body, cuda_body, define, fuse


def _reference(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    half, wide = cos.shape[-1], accumulate_dtype(x.dtype)
    shape = (x.shape[0],) + (1,) * (x.dim() - 2) + (half,)
    cos, sin = cos.reshape(shape).to(wide), sin.reshape(shape).to(wide)
    if inverse:
        sin = -sin
    first, second = x[..., :half].to(wide), x[..., half : 2 * half].to(wide)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
    if 2 * half < x.shape[-1]:
        rotated = torch.cat((rotated, x[..., 2 * half :]), -1)
    return rotated.contiguous()


def _flipped(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """The same in one formula for both halves (D = dim only), which the compiler turns into a better kernel."""
    half, wide = cos.shape[-1], accumulate_dtype(x.dtype)
    if 2 * half < x.shape[-1]:
        return _reference(x, cos, sin, inverse)
    shape = (x.shape[0],) + (1,) * (x.dim() - 1) + (half,)
    sign = torch.arange(-1, 2, 2, device=x.device)[:, None] * (-1 if inverse else 1)
    pairs = x.unflatten(-1, (2, half)).to(wide)
    turned = pairs * cos.reshape(shape) + pairs.flip(-2) * (sign * sin.reshape(shape))
    return turned.to(x.dtype).flatten(-2).contiguous()


def _fake(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


_ROPE = define("rope(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor", _reference, _fake)
_OP = add_op(
    "rope",
    [cpu_body(_ROPE), cuda_body(_ROPE), compiled_body(fuse(_flipped)), Body("reference", (_reference,))],
)


class _Rope(torch.autograd.Function):
    """x [T, .., D] -> [T, .., D]. Saved: the angles; the gradient is turned back by them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _OP.pick(x.device.type, x.dtype).run[0](x, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        return _OP.pick(grad.device.type, grad.dtype).run[0](grad, cos, sin, True), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + dim/2]) of each head by the angle of its token.

    x [T, .., D] with one or two head dimensions and any strides (a view of the fused qkv is fine), cos and sin fp32
    [T, dim/2] with dim <= D (the other D - dim dimensions pass through) -> contiguous [T, .., D] of x's dtype;
    computed in fp32. cos and sin get no gradient. ValueError where shapes, dtypes or devices do not fit.
    """
    if cos.dim() != 2 or cos.shape != sin.shape or cos.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"rope: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must both be fp32 [tokens, dim/2]"
        )
    if not 3 <= x.dim() <= 4 or x.shape[0] != cos.shape[0] or 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(f"rope: x {tuple(x.shape)} must be [T, heads, D], fitting cos {tuple(cos.shape)}")
    floating("rope", x=x)
    same_device("rope", x, cos=cos, sin=sin)
    if x.dtype != torch.float64:
        cos, sin = cos.float(), sin.float()
    return _Rope.apply(x if x.stride(-1) == 1 else x.contiguous(), cos.contiguous(), sin.contiguous())
