"""Linear layers in 8 bits that take along what stands before them, a norm or a gated unit.

The layer's input is never written in 16 bits: only its 8 bit copies are, and the transposed one is what backward keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatune.ops.checks import same_device
from megatune.ops.fp8 import (
    Fp8Recipe,
    check_linear,
    input_copies,
    product_backward,
    product_forward,
)
from megatune.ops.fp8_quantise import check_matrix, quantise_glu, quantise_rms_norm
from megatune.ops.glu import ACTIVATIONS, Activation
from megatune.ops.registry import OPS


def _norm_forward(
    ctx: Any,
    x: Tensor,
    scale: Tensor,
    weight: Tensor,
    norm: tuple[float, float],
    recipe: Fp8Recipe,
    weight_at: int,
) -> Tensor:
    """rms_norm(x) weight^T; `norm`: (eps, offset)."""
    ctx.recipe, ctx.norm = recipe, norm
    quantised, rstd = quantise_rms_norm(
        x, scale, *norm, recipe.inputs, copies=input_copies(ctx, weight_at, recipe)
    )
    return product_forward(ctx, quantised, weight, x.dtype, x, scale, rstd)


def _norm_backward(
    ctx: Any,
    grad: Tensor,
    saved: Sequence[Tensor],
    x: Tensor,
    scale: Tensor,
    need_norm: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(gradient of the norm's output, of the weight). `saved`: what `product_backward` takes; x: the norm's input."""
    grad_y, grad_weight = product_backward(ctx, grad, *saved, need_norm, need_weight)
    if need_weight and grad_weight is None:
        y = OPS["rms_norm"].pick(x.device.type, x.dtype).run[0](x, scale, *ctx.norm)[0]
        grad_weight = (grad.t() @ y).to(saved[0].dtype)
    return grad_y, grad_weight


class _NormLinear(torch.autograd.Function):
    """x [T, in], scale [in], weight [out, in] -> rms_norm(x) weight^T [T, out]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        weight: Tensor,
        norm: tuple[float, float],
        recipe: Fp8Recipe,
    ) -> Tensor:
        return _norm_forward(ctx, x, scale, weight, norm, recipe, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, x, scale, rstd = ctx.saved_tensors
        need_x, need_scale, need_weight = ctx.needs_input_grad[:3]
        grad_y, grad_weight = _norm_backward(ctx, grad, saved, x, scale, need_x or need_scale, need_weight)
        grad_x = grad_scale = None
        if grad_y is not None:
            norm = OPS["rms_norm"].pick(x.device.type, x.dtype)
            grad_x, grad_scale = norm.run[1](grad_y, x, scale, rstd, ctx.norm[1], need_scale)
        return grad_x, grad_scale.to(scale.dtype) if need_scale else None, grad_weight, None, None


class _AddNormLinear(torch.autograd.Function):
    """x, residual [T, in], scale [in], weight [out, in] -> x + residual, rms_norm(x + residual) weight^T [T, out]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        scale: Tensor,
        weight: Tensor,
        norm: tuple[float, float],
        recipe: Fp8Recipe,
    ) -> tuple[Tensor, Tensor]:
        total = (x + residual).contiguous()
        return total, _norm_forward(ctx, total, scale, weight, norm, recipe, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, total, scale, rstd = ctx.saved_tensors
        *needs, need_scale, need_weight = ctx.needs_input_grad[:4]
        grad_y, grad_weight = _norm_backward(
            ctx, grad, saved, total, scale, any(needs) or need_scale, need_weight
        )
        grad_x = grad_scale = None
        if grad_y is not None:
            norm = OPS["add_rms_norm"].pick(total.device.type, total.dtype)
            arguments = (grad_sum.contiguous(), total, scale, rstd, ctx.norm[1], need_scale)
            grad_x, grad_scale = norm.run[1](grad_y, *arguments)
        return grad_x, grad_x, grad_scale.to(scale.dtype) if need_scale else None, grad_weight, None, None


class _GluLinear(torch.autograd.Function):
    """gate_up [T, 2 in], weight [out, in] -> glu(gate_up) weight^T [T, out]."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight: Tensor, activation: int, recipe: Fp8Recipe) -> Tensor:
        ctx.recipe, ctx.activation = recipe, activation
        copies = input_copies(ctx, 1, recipe)
        quantised = quantise_glu(gate_up, ACTIVATIONS[activation], recipe.inputs, copies=copies)
        return product_forward(ctx, quantised, weight, gate_up.dtype, gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, gate_up = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[:2]
        glu = OPS["glu"].pick(gate_up.device.type, gate_up.dtype)
        grad_y, grad_weight = product_backward(ctx, grad, *saved, need_x, need_weight)
        if need_weight and grad_weight is None:
            grad_weight = (grad.t() @ glu.run[0](gate_up, ctx.activation)).to(saved[0].dtype)
        grad_x = None if grad_y is None else glu.run[1](grad_y, gate_up, ctx.activation)
        return grad_x, grad_weight, None, None


def _check_norm(
    op: str, x: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None, recipe: Fp8Recipe
) -> None:
    check_matrix(op, "x", x, x.shape[-1], recipe.inputs)
    check_linear(op, x, x.shape[1], weight, bias, recipe)
    if scale.shape != x.shape[1:]:
        raise ValueError(f"{op}: scale {tuple(scale.shape)} must be [{x.shape[1]}]")
    same_device(op, x, scale=scale)


def fp8_norm_linear(
    x: Tensor,
    scale: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    offset: float = 0.0,
    recipe: Fp8Recipe,
) -> Tensor:
    """`fp8_linear(rms_norm(x, scale, eps, offset), weight, bias)`, the norm's output in 8 bits only.

    x [T, in], scale [in], weight [out, in] -> [T, out]. Gradients to x, scale, weight and bias. ValueError where
    shapes, dtypes or devices do not fit."""
    _check_norm("fp8_norm_linear", x, scale, weight, bias, recipe)
    x = x if x.stride(1) == 1 else x.contiguous()
    y = _NormLinear.apply(x, scale, weight, (eps, offset), recipe)
    return y if bias is None else y + bias


def fp8_add_norm_linear(
    x: Tensor,
    residual: Tensor,
    scale: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    offset: float = 0.0,
    recipe: Fp8Recipe,
) -> tuple[Tensor, Tensor]:
    """(x + residual, what `fp8_norm_linear` makes of it): the residual stream and the next block's first product.

    x and residual [T, in], scale [in], weight [out, in] -> [T, in], [T, out]. Gradients to all tensors. ValueError
    where shapes, dtypes or devices do not fit."""
    op = "fp8_add_norm_linear"
    _check_norm(op, x, scale, weight, bias, recipe)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"{op}: residual {residual.dtype} {tuple(residual.shape)} must be like x {x.dtype} {tuple(x.shape)}"
        )
    same_device(op, x, residual=residual)
    total, y = _AddNormLinear.apply(x, residual, scale, weight, (eps, offset), recipe)
    return total, y if bias is None else y + bias


def fp8_glu_linear(
    gate_up: Tensor,
    activation: Activation,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    recipe: Fp8Recipe,
) -> Tensor:
    """`fp8_linear(glu(gate_up, activation), weight, bias)`, the unit's output in 8 bits only.

    gate_up [T, 2 in] interleaved, weight [out, in] -> [T, out]. Gradients to gate_up, weight and bias. ValueError where
    shapes, dtypes or devices do not fit, or for an unknown activation."""
    op = "fp8_glu_linear"
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}, must be one of {', '.join(ACTIVATIONS)}")
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"{op}: gate_up {tuple(gate_up.shape)} must be [T, 2 in]")
    check_matrix(op, "gate_up", gate_up, gate_up.shape[1] // 2, recipe.inputs)
    check_linear(op, gate_up, gate_up.shape[1] // 2, weight, bias, recipe)
    gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    y = _GluLinear.apply(gate_up, weight, ACTIVATIONS.index(activation), recipe)
    return y if bias is None else y + bias
