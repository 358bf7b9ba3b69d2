"""Root-mean-square norm (arXiv:1910.07467) and layer norm (arXiv:1607.06450)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatune.ops.checks import accumulate_dtype, floating, same_device
from megatune.ops.registry import Body, add_op, compiled_body, cpu_body, cuda_body, define, fuse


def _reference(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """(y like x, contiguous; rstd [..] in fp32)."""
    wide = x.to(accumulate_dtype(x.dtype))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * rstd
    if offset == 0.0:
        y = normed.to(x.dtype) * weight
    else:
        y = normed * (offset + weight.to(wide.dtype))
    return y.to(x.dtype).contiguous(), rstd.squeeze(-1).contiguous()


def _reference_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """(gradient of x; gradient of the weight in its dtype, summed in fp32, [0] if not wanted)."""
    grad_x, grad_weight = _wide_gradients(grad, x, weight, rstd, offset, weight_grad)
    return grad_x.to(x.dtype).contiguous(), grad_weight.to(weight.dtype)


def _wide_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """Both gradients before they are rounded.

    With h = x * rstd and g = grad * (offset + weight): grad_x = rstd * (g - h * mean(g * h)).
    """
    wide = grad.to(rstd.dtype)
    normed = x.to(rstd.dtype) * rstd.unsqueeze(-1)
    scaled = wide * (offset + weight.to(rstd.dtype))
    grad_x = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    if weight_grad:
        grad_weight = (wide * normed).flatten(0, -2).sum(0)
    else:
        grad_weight = rstd.new_empty(0)
    return grad_x, grad_weight


def _fake(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=accumulate_dtype(x.dtype))


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape[0] if weight_grad else 0)


_FORWARD = define(
    "rms_norm(Tensor x, Tensor weight, float eps, float offset) -> (Tensor, Tensor)", _reference, _fake
)
_BACKWARD = define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, float offset, bool weight_grad) "
    "-> (Tensor, Tensor)",
    _reference_backward,
    _fake_backward,
)
_OP = add_op(
    "rms_norm",
    [
        cpu_body(_FORWARD, _BACKWARD),
        cuda_body(_FORWARD, _BACKWARD),
        compiled_body(fuse(_reference), fuse(_reference_backward)),
        Body("reference", (_reference, _reference_backward)),
    ],
)


def _add_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(x + residual; what `_reference` makes of it)."""
    total = (x + residual).contiguous()
    return total, *_reference(total, weight, eps, offset)


def _add_reference_backward(
    grad: Tensor,
    grad_sum: Tensor,
    total: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(gradient of x, which is that of the residual too; gradient of the weight). `grad_sum`: of x + residual."""
    grad_x, grad_weight = _wide_gradients(grad, total, weight, rstd, offset, weight_grad)
    return (grad_x + grad_sum).to(total.dtype).contiguous(), grad_weight.to(weight.dtype)


def _add_fake(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *_fake(x, weight, eps, offset)


def _add_fake_backward(
    grad: Tensor,
    grad_sum: Tensor,
    total: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    return _fake_backward(grad, total, weight, rstd, offset, weight_grad)


def _add_split(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's sum, and the compiled norm of it."""
    total = (x + residual).contiguous()
    return total, *_FORWARD(total, weight, eps, offset)


def _add_split_backward(
    grad: Tensor,
    grad_sum: Tensor,
    total: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = _BACKWARD(grad, total, weight, rstd, offset, weight_grad)
    return grad_x.add_(grad_sum), grad_weight


_ADD_FORWARD = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float offset) -> (Tensor, Tensor, Tensor)",
    _add_reference,
    _add_fake,
)
_ADD_BACKWARD = define(
    "add_rms_norm_backward(Tensor grad, Tensor grad_sum, Tensor total, Tensor weight, Tensor rstd, float offset, "
    "bool weight_grad) -> (Tensor, Tensor)",
    _add_reference_backward,
    _add_fake_backward,
)
_ADD_OP = add_op(
    "add_rms_norm",
    [
        cpu_body(_add_split, _add_split_backward),
        cuda_body(_ADD_FORWARD, _ADD_BACKWARD),
        compiled_body(fuse(_add_reference), fuse(_add_reference_backward)),
        Body("reference", (_add_reference, _add_reference_backward)),
    ],
)


class _RmsNorm(torch.autograd.Function):
    """x [.., H], weight [H] -> y [.., H]. Saved: x, weight, rstd [..]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        body = _OP.pick(x.device.type, x.dtype)
        y, rstd = body.run[0](x, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, rstd = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1]
        body = _OP.pick(x.device.type, x.dtype)
        grad_x, grad_weight = body.run[1](grad.contiguous(), x, weight, rstd, ctx.offset, wanted)
        return grad_x, grad_weight if wanted else None, None, None


class _AddRmsNorm(torch.autograd.Function):
    """x, residual [.., H], weight [H] -> x + residual and its norm, both [.., H]. Saved: the sum, weight, rstd."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
    ) -> tuple[Tensor, Tensor]:
        total, y, rstd = _ADD_OP.pick(x.device.type, x.dtype).run[0](x, residual, weight, eps, offset)
        ctx.save_for_backward(total, weight, rstd)
        ctx.offset = offset
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2]
        body = _ADD_OP.pick(total.device.type, total.dtype)
        grad_x, grad_weight = body.run[1](
            grad.contiguous(), grad_sum.contiguous(), total, weight, rstd, ctx.offset, wanted
        )
        return grad_x, grad_x, grad_weight if wanted else None, None, None


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(x + residual, its `rms_norm`): the residual stream and what the next block reads, in one pass.

    x and residual [.., H] of one dtype, with up to three leading dimensions of any strides, weight [H] -> two
    contiguous [.., H] of that dtype. The sum is rounded before it is normalised, as if it were computed by itself.
    ValueError where shapes, dtypes or devices do not fit.
    """
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"add_rms_norm: residual {residual.dtype} {tuple(residual.shape)} must be like x {x.dtype} "
            f"{tuple(x.shape)}"
        )
    if weight.dim() != 1 or x.shape[-1:] != weight.shape or not 2 <= x.dim() <= 4:
        raise ValueError(
            f"add_rms_norm: x {tuple(x.shape)} must have two to four dimensions and weight {tuple(weight.shape)} "
            "the size of the last one"
        )
    floating("add_rms_norm", x=x, weight=weight)
    same_device("add_rms_norm", x, residual=residual, weight=weight)
    x, residual = (part if part.stride(-1) == 1 else part.contiguous() for part in (x, residual))
    return _AddRmsNorm.apply(x, residual, weight, eps, offset)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * (offset + weight) over the last dimension, computed in fp32.

    x [.., H] with up to three leading dimensions of any strides, weight [H] -> contiguous [.., H] of x's dtype. With
    offset 0 the normalised x is rounded to x's dtype before it is multiplied by the weight (Llama's order of casts);
    with another offset it is rounded after (Gemma's). ValueError where shapes, dtypes or devices do not fit.
    """
    if weight.dim() != 1 or x.shape[-1:] != weight.shape or not 2 <= x.dim() <= 4:
        raise ValueError(
            f"rms_norm: x {tuple(x.shape)} must have two to four dimensions and weight {tuple(weight.shape)} the "
            "size of the last one"
        )
    floating("rms_norm", x=x, weight=weight)
    same_device("rms_norm", x, weight=weight)
    return _RmsNorm.apply(x if x.stride(-1) == 1 else x.contiguous(), weight, eps, offset)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) * rsqrt(var + eps) * weight + bias over the last dimension, computed in fp32 (PyTorch's kernel).

    x [.., H], weight and bias [H] -> [.., H] of x's dtype. ValueError where shapes, dtypes or devices do not fit.
    """
    if weight.dim() != 1 or x.shape[-1:] != weight.shape:
        raise ValueError(
            f"layer_norm: weight {tuple(weight.shape)} must have the size of x's last dimension {x.shape}"
        )
    if bias is not None and bias.shape != weight.shape:
        raise ValueError(f"layer_norm: bias {tuple(bias.shape)} must be like weight {tuple(weight.shape)}")
    floating("layer_norm", x=x, weight=weight, bias=bias)
    same_device("layer_norm", x, weight=weight, bias=bias)
    bias = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias, eps)
