"""Rotary position embedding (RoFormer, arXiv:2104.09864), half-split as in Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatune.ops.checks import accumulate_dtype, floating, same_device
from megatune.ops.registry import Body, add_op, compiled_body, cpu_body, cuda_body, define, fuse

Turn = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def _of_both(turn: Turn) -> Callable[..., tuple[Tensor, Tensor]]:
    """What turns queries [T, K, G, D] and keys [T, K, D] from what turns one of them."""

    def both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return turn(q, cos, sin, inverse), turn(k, cos, sin, inverse)

    return both


def _turn(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
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
        return _turn(x, cos, sin, inverse)
    shape = (x.shape[0],) + (1,) * (x.dim() - 1) + (half,)
    sign = torch.arange(-1, 2, 2, device=x.device)[:, None] * (-1 if inverse else 1)
    pairs = x.unflatten(-1, (2, half)).to(wide)
    turned = pairs * cos.reshape(shape) + pairs.flip(-2) * (sign * sin.reshape(shape))
    return turned.to(x.dtype).flatten(-2).contiguous()


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


_REFERENCE = _of_both(_turn)
_ROPE = define(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)", _REFERENCE, _fake
)
_OP = add_op(
    "rope",
    [
        cpu_body(_ROPE),
        cuda_body(_ROPE),
        compiled_body(fuse(_of_both(_flipped))),
        Body("reference", (_REFERENCE,)),
    ],
)


class _Rope(torch.autograd.Function):
    """q [T, K, G, D], k [T, K, D] -> the same shapes. Saved: the angles; gradients are turned back by them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _OP.pick(q.device.type, q.dtype).run[0](q, k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        grad_q, grad_k = (g if g.stride(-1) == 1 else g.contiguous() for g in (grad_q, grad_k))
        run = _OP.pick(grad_q.device.type, grad_q.dtype).run[0]
        return (*run(grad_q, grad_k, *ctx.saved_tensors, True), None, None)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates the pairs (x[i], x[i + dim/2]) of each query and key by the angle of its token.

    q [T, K, G, D], of each of K groups G query heads, and k [T, K, D], of any strides (views of the fused qkv are
    fine), of one dtype; cos and sin fp32 [T, dim/2] with dim <= D (the other D - dim dimensions pass through) -> both,
    contiguous; computed in fp32. cos and sin get no gradient. ValueError where shapes, dtypes or devices do not fit.
    """
    op = "rope"
    if cos.dim() != 2 or cos.shape != sin.shape or cos.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{op}: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must both be fp32 [tokens, dim/2]"
        )
    if q.dim() != 4 or q.shape[0] != cos.shape[0] or 2 * cos.shape[1] > q.shape[3]:
        raise ValueError(f"{op}: q {tuple(q.shape)} must be [T, K, G, D], fitting cos {tuple(cos.shape)}")
    if k.shape != (*q.shape[:2], q.shape[3]) or k.dtype != q.dtype:
        raise ValueError(
            f"{op}: k {k.dtype} {tuple(k.shape)} must be [T, K, D], fitting q {q.dtype} {tuple(q.shape)}"
        )
    floating(op, q=q, k=k)
    same_device(op, q, k=k, cos=cos, sin=sin)
    if q.dtype != torch.float64:
        cos, sin = cos.float(), sin.float()
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    return _Rope.apply(q, k, cos.contiguous(), sin.contiguous())
