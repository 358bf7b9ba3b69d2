"""Causal attention on packed documents (arXiv:1706.03762) with grouped KV heads (arXiv:2305.13245)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatune.ops.norm import accumulate_dtype
from megatune.ops.segments import Segments


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    key_segments: Segments | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v, each token seeing itself and the earlier tokens of its document.

    q [T, Q, D], k and v [T, K, D] with Q a multiple of K (query head h reads KV head h // (Q / K)), any strides in
    the first two dimensions -> [T, Q, D] of q's dtype; softmax in fp32. `window`: tokens a query sees, itself
    included. `softcap`: scores become cap * tanh(score / cap) before the mask. `key_segments`: borders of k and v
    where they hold more tokens than q (decoding with a cache): the queries of a document are its last tokens.
    ValueError where the shapes do not fit.
    """
    keys = segments if key_segments is None else key_segments
    _check(q, k, v, segments, keys, window)
    outputs = [
        _dense(*document, scale, window, softcap)
        for document in zip(
            q.split(segments.lengths), k.split(keys.lengths), v.split(keys.lengths), strict=True
        )
    ]
    return torch.cat(outputs) if outputs else torch.empty_like(q)


def _check(q: Tensor, k: Tensor, v: Tensor, segments: Segments, keys: Segments, window: int | None) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be [T, heads, D] with "
            "equal k and v and one D"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: q has {q.shape[1]} heads, which is no multiple of k's {k.shape[1]}")
    if q.shape[0] != segments.tokens or k.shape[0] != keys.tokens:
        raise ValueError(
            f"attention: q has {q.shape[0]} and k {k.shape[0]} tokens, their segments "
            f"{segments.tokens} and {keys.tokens}"
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be at least 1, got {window}")


def _dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """One document: q [L, Q, D], k and v [M, K, D] with M >= L, the queries being the last L of M tokens."""
    length, heads, dim = q.shape
    total, kv_heads, _ = k.shape
    wide = accumulate_dtype(q.dtype)
    grouped = q.to(wide).reshape(length, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("lkgd,mkd->kglm", grouped, k.to(wide)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    query_at = torch.arange(total - length, total, device=q.device)[:, None]
    key_at = torch.arange(total, device=q.device)
    hidden = key_at > query_at
    if window is not None:
        hidden |= key_at <= query_at - window
    probabilities = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
    return torch.einsum("kglm,mkd->lkgd", probabilities, v.to(wide)).reshape(length, heads, dim).to(q.dtype)
