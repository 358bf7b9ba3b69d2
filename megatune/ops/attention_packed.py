"""Attention on packed documents as one operator: forward with log-sum-exp, and its gradients (csrc/cpu/attention.cpp).

Where no kernel is built, the operators compute document by document, as the references here do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatune.ops._load import cpu_problem
from megatune.ops.attention_bodies import hidden_mask
from megatune.ops.checks import accumulate_dtype
from megatune.ops.registry import define
from megatune.ops.segments import Segments


def _scores(q: Tensor, k: Tensor, scale: float, window: int, softcap: float) -> tuple[Tensor, Tensor | None]:
    """One document, q [L, Q, D], k [L, K, D]: (masked scores [K, Q / K, L, L], slope of the cap or None), wide."""
    length, kv_heads, dim = k.shape
    wide = accumulate_dtype(q.dtype)
    grouped = q.to(wide).reshape(length, kv_heads, -1, dim)
    scores = torch.einsum("lkgd,mkd->kglm", grouped, k.to(wide)) * scale
    slope = None
    if softcap:
        tanh = torch.tanh(scores / softcap)
        scores, slope = softcap * tanh, 1 - tanh.square()
    return scores.masked_fill(hidden_mask(length, length, window or None, q.device), float("-inf")), slope


def _documents(cu_seqlens: Tensor, *tensors: Tensor) -> Any:
    lengths = cu_seqlens.diff().tolist()
    return zip(*(tensor.split(lengths) for tensor in tensors), strict=True)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """(out [T, Q, D] like q, log-sum-exp [Q, T] in fp32)."""
    out, lse = _fake(q, k, v, cu_seqlens, scale, window, softcap)
    for q_doc, k_doc, v_doc, out_doc, lse_doc in _documents(cu_seqlens, q, k, v, out, lse.t()):
        scores, _ = _scores(q_doc, k_doc, scale, window, softcap)
        log_sum = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - log_sum[..., None])
        out_doc.copy_(torch.einsum("kglm,mkd->lkgd", weights, v_doc.to(weights.dtype)).reshape(out_doc.shape))
        lse_doc.copy_(log_sum.flatten(0, 1).t())
    return out, lse


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
    """(gradients of q, k, v). With p the probabilities: ds = p * (grad v^T - rowsum(grad * out))."""
    grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
    parts = (grad, q, k, v, out, lse.t(), *grads)
    for grad_doc, q_doc, k_doc, v_doc, out_doc, lse_doc, grad_q, grad_k, grad_v in _documents(
        cu_seqlens, *parts
    ):
        scores, slope = _scores(q_doc, k_doc, scale, window, softcap)
        wide, shape = scores.dtype, (q_doc.shape[0], k_doc.shape[1], -1, q_doc.shape[2])
        log_sum = lse_doc.t().reshape(scores.shape[:-1])
        weights = torch.exp(scores - log_sum[..., None])
        grouped = grad_doc.to(wide).reshape(shape)
        delta = (grouped * out_doc.to(wide).reshape(shape)).sum(-1).permute(1, 2, 0)
        grad_scores = weights * (torch.einsum("lkgd,mkd->kglm", grouped, v_doc.to(wide)) - delta[..., None])
        if slope is not None:
            grad_scores = grad_scores * slope
        grad_q.copy_(
            torch.einsum("kglm,mkd->lkgd", grad_scores, k_doc.to(wide)).reshape(grad_q.shape) * scale
        )
        grad_k.copy_(torch.einsum("kglm,lkgd->mkd", grad_scores, q_doc.to(wide).reshape(shape)) * scale)
        grad_v.copy_(torch.einsum("kglm,lkgd->mkd", weights, grouped))
    return grads


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
    """q [T, Q, D], k, v [T, K, D] -> [T, Q, D]. Saved: q, k, v, the output, log-sum-exp [Q, T], cu_seqlens."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        scale: float,
        window: int,
        softcap: float,
    ) -> Tensor:
        out, lse = FORWARD(q, k, v, cu_seqlens, scale, window, softcap)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        ctx.options = (scale, window, softcap)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *BACKWARD(grad.contiguous(), *ctx.saved_tensors, *ctx.options), None, None, None, None


def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    keys: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """The body of attention that calls these operators; see attention_bodies for the arguments."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _Attention.apply(q, k, v, segments.cu_seqlens, scale, window or 0, softcap or 0.0)


def packed_problem() -> str | None:
    """Why the compiled kernels cannot be used on this machine, None if they can."""
    problem = cpu_problem()
    if problem is None and not torch.ops.megatune.cpu_has_amx():
        return "this CPU has no AMX tiles"
    return problem
