"""Causal attention on packed documents (arXiv:1706.03762) with grouped KV heads (arXiv:2305.13245)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatune.ops import attention_bodies as bodies
from megatune.ops.attention_blocks import HALF
from megatune.ops.attention_packed import packed, packed_problem
from megatune.ops.checks import floating, same_device
from megatune.ops.registry import Body, add_op
from megatune.ops.segments import Segments

_OP = add_op(
    "attention",
    [
        Body(
            "varlen",
            bodies.varlen,
            ("cuda",),
            HALF,
            bodies.varlen_features,  # not called here: asking torch takes 2 s
            problem=bodies.varlen_problem,
        ),
        Body("flex", bodies.flex, ("cuda",), HALF, ("window", "softcap"), problem=bodies.flex_problem),
        Body(
            "cpu", packed, ("cpu",), (torch.bfloat16,), ("window", "softcap", "sinks"), problem=packed_problem
        ),
        Body("sdpa", bodies.sdpa, None, None, ("window", "cache")),
        Body("reference", bodies.reference),
    ],
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_segments: Segments | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v, each token seeing itself and the earlier tokens of its document.

    q [T, Q, D], k [T, K, D] and v [T, K, Dv] with Q a multiple of K (query head h reads KV head h // (Q / K)), any
    strides in the first two dimensions -> [T, Q, Dv] of q's dtype; softmax in fp32. `window`: tokens a query sees,
    itself included. `softcap`: scores become cap * tanh(score / cap) before the mask. `sinks` [Q]: one more logit in
    each query's softmax, per head, whose value is 0 (gpt-oss). `key_segments`: borders of k and v where they hold more
    tokens than q (decoding with a cache): the queries of a document are its last tokens.
    ValueError where shapes, dtypes or devices do not fit, or the body asked for cannot do this.
    """
    keys = segments if key_segments is None else key_segments
    check_attention(q, k, v, segments, keys, window, softcap, sinks)
    if window is not None and window >= keys.max_seqlen:
        window = None
    features = ()
    if window is not None:
        features += ("window",)
    if softcap is not None:
        features += ("softcap",)
    if key_segments is not None:
        features += ("cache",)
    if sinks is not None:
        features += ("sinks",)
    if q.shape[0] == 0:
        return q.new_empty((*q.shape[:2], v.shape[2])) + 0 * q[..., :1]  # keeps the graph
    return _OP.pick(q.device.type, q.dtype, features).run(
        q, k, v, segments, keys, scale, window, softcap, sinks
    )


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    keys: Segments,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """ValueError where shapes, dtypes or devices of attention's arguments do not fit."""
    if q.dim() != 3 or k.dim() != 3 or k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be [T, heads, D] with "
            "tokens and heads of k and v alike and one D of q and k"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention: q has {q.shape[1]} heads, which is no multiple of the {k.shape[1]} of k"
        )
    if q.shape[0] != segments.tokens or k.shape[0] != keys.tokens:
        raise ValueError(
            f"attention: q has {q.shape[0]} and k {k.shape[0]} tokens, segments {segments.tokens} and {keys.tokens}"
        )
    if len(segments.lengths) != len(keys.lengths):
        raise ValueError(
            f"attention: segments has {len(segments.lengths)} documents, key_segments {len(keys.lengths)}"
        )
    if (window is not None and window < 1) or (softcap is not None and softcap <= 0):
        raise ValueError(f"attention: window ({window}) and softcap ({softcap}) must be positive")
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(
            f"attention: sinks {tuple(sinks.shape)} must be one for each of the {q.shape[1]} heads of q"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}; they must have one dtype")
    floating("attention", q=q)
    same_device("attention", q, k=k, v=v, sinks=sinks)
