"""Queries, keys and values of a packed product: norm of each head, rotary embedding and separation in one pass.

Not in place. The traffic is the same either way (a byte read and a byte written, of queries and keys only), and so is
the time measured; what it would spare is the memory of queries and keys beside the product, which the values, a view of
it, keep alive. Against it: heads stand by group in the product, [T, K, G + 2, D] (tensor parallelism deals out whole
groups), while FlashAttention, SDPA and ring attention take queries [T, heads, D] at equal steps, which those of several
groups are not, so that turned queries would have to be copied out after all; selective recompute keeps the product, to
turn it once more in backward; and backward through a norm of heads needs it as it was, for a rounded result divided by
a weight that may be zero does not give it back. Backward writes the gradient of the whole product at once, where views
of it would have to be joined by a copy of everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatune.ops.checks import accumulate_dtype, floating, same_device
from megatune.ops.norm import rms_norm
from megatune.ops.registry import OPS, Body, add_op, compiled_body, cpu_body, cuda_body, define
from megatune.ops.rope import rope

# Elements of a head with a norm that are turned by cos, or not turned: more the CUDA kernel does not keep.
WIDEST_NORM = 256


def _split(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views [T, K, G, D], [T, K, D], [T, K, D]."""
    return qkv[:, :, :-2], qkv.select(2, -2), qkv.select(2, -1)


def _composition(body: str) -> tuple[Callable, Callable]:
    """(forward, backward) made of that body of rms_norm and of rope; arguments as in the operators' schemas."""
    norm, norm_backward = OPS["rms_norm"].bodies[body].run
    (turn,) = OPS["rope"].bodies[body].run

    def forward(
        qkv: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, *more: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(q [T, K, G, D]; k [T, K, D]; rstd of a group's queries and its key [T, K, G + 1], of no tokens without a
        norm)."""
        q, k, _ = _split(qkv)
        rstd = _fake(qkv, cos, sin, None)[2]
        if q_weight is not None:
            (q, q_rstd), (k, k_rstd) = norm(q, q_weight, *more), norm(k, k_weight, *more)
            rstd = torch.cat((q_rstd, k_rstd.unsqueeze(2)), 2)
        return (*turn(q, k, cos, sin, False), rstd)

    def backward(
        grad_q: Tensor,
        grad_k: Tensor,
        grad_v: Tensor,
        cos: Tensor,
        sin: Tensor,
        qkv: Tensor | None,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        rstd: Tensor | None,
        offset: float,
        weight_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        """(gradient of qkv; of both weights in fp32 [2, D], none if not wanted). Gradients are [T, heads, D]."""
        grad_q, grad_k = turn(grad_q.unflatten(1, (grad_v.shape[1], -1)), grad_k, cos, sin, True)
        grad_weight = grad_v.new_empty(0, grad_v.shape[2], dtype=accumulate_dtype(grad_v.dtype))
        if qkv is not None:
            (q, k, _), (of_q, of_k) = _split(qkv), rstd.split((rstd.shape[2] - 1, 1), 2)
            more = offset, weight_grad
            grad_q, for_q = norm_backward(grad_q, q, q_weight, of_q.contiguous(), *more)
            grad_k, for_k = norm_backward(grad_k, k, k_weight, of_k.squeeze(2).contiguous(), *more)
            if weight_grad:
                grad_weight = torch.stack((for_q, for_k))
        return torch.cat((grad_q, grad_k.unsqueeze(2), grad_v.unsqueeze(2)), 2), grad_weight

    return forward, backward


def _fake(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, *more: Any
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, groups, heads, width = qkv.shape
    kept = 0 if q_weight is None else tokens
    return (
        qkv.new_empty(tokens, groups, heads - 2, width),
        qkv.new_empty(tokens, groups, width),
        qkv.new_empty((kept, groups, heads - 1), dtype=accumulate_dtype(qkv.dtype)),
    )


def _fake_backward(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
    (tokens, groups, width), (_, _, qkv, *_, weight_grad) = grad_v.shape, more
    rows = 2 if qkv is not None and weight_grad else 0
    grad = grad_v.new_empty(tokens, groups, grad_q.shape[1] // groups + 2, width)
    return grad, grad_v.new_empty((rows, width), dtype=accumulate_dtype(grad_v.dtype))


_REFERENCE, _REFERENCE_BACKWARD = _composition("reference")
_FORWARD = define(
    "rope_qk(Tensor qkv, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, float eps, float offset) "
    "-> (Tensor, Tensor, Tensor)",
    _REFERENCE,
    _fake,
)
_BACKWARD = define(
    "rope_qk_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor cos, Tensor sin, Tensor? qkv, "
    "Tensor? q_weight, Tensor? k_weight, Tensor? rstd, float offset, bool weight_grad) "
    "-> (Tensor, Tensor)",
    _REFERENCE_BACKWARD,
    _fake_backward,
)
_OP = add_op(
    "rope_qk",
    [
        cpu_body(*_composition("cpu")),
        cuda_body(_FORWARD, _BACKWARD),
        compiled_body(*_composition("compiled")),
        Body("reference", (_REFERENCE, _REFERENCE_BACKWARD)),
    ],
)


class _RopeQk(torch.autograd.Function):
    """qkv [T, K, G + 2, D] -> q [T, K, G, D], k [T, K, D], v [T, K, D]. Saved: the angles; with a norm also qkv, which
    v keeps alive anyway, the weights, and rstd of each head."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        *norm: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, rstd = _OP.pick(qkv.device.type, qkv.dtype).run[0](qkv, cos, sin, q_weight, k_weight, *norm)
        normed = (qkv, q_weight, k_weight, rstd) if q_weight is not None else (None,) * 4
        ctx.save_for_backward(cos, sin, *normed)
        _, ctx.offset = norm
        return q, k, qkv.select(2, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        _, _, _, q_weight, k_weight, _ = saved
        need_q, need_k = ctx.needs_input_grad[3:5]
        # A copy: `contiguous` leaves an expanded gradient without elements as it is.
        grads = (
            g if g.stride(-1) == 1 else g.clone(memory_format=torch.contiguous_format)
            for g in (grad_q.flatten(1, 2), grad_k, grad_v)
        )
        run = _OP.pick(grad_v.device.type, grad_v.dtype).run[1]
        grad_qkv, of_weights = run(*grads, *saved, ctx.offset, need_q or need_k)
        for_q = of_weights[0].to(q_weight.dtype) if need_q else None
        for_k = of_weights[1].to(k_weight.dtype) if need_k else None
        return grad_qkv, None, None, for_q, for_k, None, None


def rope_qk(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The heads of a packed product, queries and keys normalised (`rms_norm`, with weights only) and turned (`rope`).

    qkv [T, K, G + 2, D] of any strides: of each of K groups G query heads, the key and the value. cos and sin fp32 [T,
    dim/2], dim <= D, for the tokens' positions, whatever they are; they get no gradient. q_weight and k_weight [D],
    both or none, `eps` and `offset` as of `rms_norm`. -> q [T, K, G, D] and k [T, K, D], contiguous, of qkv's dtype,
    and v [T, K, D], a view of qkv, which must not be changed afterwards. Between norm and rotation the CUDA body does
    not round. ValueError where shapes, dtypes or devices do not fit.
    """
    op = "rope_qk"
    if qkv.dim() != 4 or qkv.shape[2] < 3:
        raise ValueError(f"{op}: qkv {tuple(qkv.shape)} must be [T, groups, queries + 2, D]")
    if cos.dim() != 2 or cos.shape != sin.shape or cos.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{op}: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must both be fp32 [tokens, dim/2]"
        )
    if cos.shape[0] != qkv.shape[0] or 2 * cos.shape[1] > qkv.shape[3]:
        raise ValueError(f"{op}: cos {tuple(cos.shape)} must be [T, dim/2], fitting qkv {tuple(qkv.shape)}")
    if (q_weight is None) != (k_weight is None):
        raise ValueError(f"{op}: q_weight and k_weight must both be given, or none of them")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and weight.shape != qkv.shape[3:]:
            raise ValueError(
                f"{op}: {name} {tuple(weight.shape)} must be as long as a head of qkv {tuple(qkv.shape)}"
            )
    if q_weight is not None and k_weight is not None and q_weight.dtype != k_weight.dtype:
        raise ValueError(f"{op}: q_weight {q_weight.dtype} and k_weight {k_weight.dtype} must have one dtype")
    floating(op, qkv=qkv, q_weight=q_weight, k_weight=k_weight)
    same_device(op, qkv, cos=cos, sin=sin, q_weight=q_weight, k_weight=k_weight)
    if q_weight is not None and max(cos.shape[1], qkv.shape[3] - 2 * cos.shape[1]) > WIDEST_NORM:
        return _by_parts(qkv, cos, sin, q_weight, k_weight, eps, offset)
    if qkv.dtype != torch.float64:
        cos, sin = cos.float(), sin.float()
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    return _RopeQk.apply(qkv, cos.contiguous(), sin.contiguous(), q_weight, k_weight, eps, offset)


def _by_parts(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor, *norm: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One op after the other: for heads that the kernel has no room for."""
    # One split: its backward is one concatenation, that of slices fills the whole with zeros three times.
    q, k, v = qkv.split((qkv.shape[2] - 2, 1, 1), dim=2)
    q, k = rms_norm(q, q_weight, *norm), rms_norm(k.squeeze(2), k_weight, *norm)
    return (*rope(q, k, cos, sin), v.squeeze(2))
