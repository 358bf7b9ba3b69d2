"""Attention on packed documents as one operator: forward with log-sum-exp, and its gradients (csrc/cpu/attention.cpp).

Where no kernel is built, the operators compute document by document, as the references here do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatune.ops._load import cpu_problem
from megatune.ops.attention_blocks import Block, add_sinks, reference, reference_backward, sinks_gradient
from megatune.ops.attention_bodies import one_width
from megatune.ops.checks import accumulate_dtype
from megatune.ops.registry import define
from megatune.ops.segments import Segments


def _block(cu_seqlens: Tensor, window: int) -> Block:
    lengths = tuple(cu_seqlens.diff().tolist())
    return Block(lengths, lengths, cu_seqlens, cu_seqlens, window - 1 if window else None, 0)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """(out [T, Q, D] like q, log-sum-exp [Q, T] in fp32)."""
    out, lse = reference(q, k, v, _block(cu_seqlens, window), scale, softcap or None)
    return out.to(q.dtype), lse


def _reference_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradients of q, k, v)."""
    block = _block(cu_seqlens, window)
    grads = reference_backward(grad, q, k, v, out, lse, block, scale, softcap or None)
    return tuple(gradient.to(q.dtype) for gradient in grads)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=accumulate_dtype(q.dtype))


def _fake_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# window 0 and softcap 0: none.
FORWARD = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float scale, int window, float softcap) "
    "-> (Tensor, Tensor)",
    _reference,
    _fake,
)
BACKWARD = define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens, "
    "float scale, int window, float softcap) -> (Tensor, Tensor, Tensor)",
    _reference_backward,
    _fake_backward,
)


class _Attention(torch.autograd.Function):
    """q [T, Q, D], k, v [T, K, D], sinks [Q] or None -> [T, Q, D].

    Saved: q, k, v, the output, log-sum-exp [Q, T], cu_seqlens, sinks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        cu_seqlens: Tensor,
        scale: float,
        window: int,
        softcap: float,
    ) -> Tensor:
        out, lse = FORWARD(q, k, v, cu_seqlens, scale, window, softcap)
        if sinks is not None:
            out, lse = add_sinks(out, lse, sinks)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, sinks)
        ctx.options = (scale, window, softcap)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu_seqlens, sinks = ctx.saved_tensors
        grad = grad.contiguous()
        grads = BACKWARD(grad, q, k, v, out, lse, cu_seqlens, *ctx.options)
        grad_sinks = None if sinks is None else sinks_gradient(grad, out, lse, sinks)
        return *grads, grad_sinks, None, None, None, None


def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    keys: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The body of attention that calls these operators; see attention_bodies for the arguments."""
    q, k, v, value_dim = one_width(q, k, v)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = _Attention.apply(q, k, v, sinks, segments.cu_seqlens, scale, window or 0, softcap or 0.0)
    return out[..., :value_dim]


def packed_problem() -> str | None:
    """Why the compiled kernels cannot be used on this machine, None if they can."""
    problem = cpu_problem()
    if problem is None and not torch.ops.megatune.cpu_has_amx():
        return "this CPU has no AMX tiles"
    return problem
