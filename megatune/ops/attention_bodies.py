"""Bodies of attention: of (q [T, Q, D], k [M, K, D], v [M, K, Dv], segments, keys, scale, window, softcap, sinks).

`segments` are the borders of q, `keys` those of k and v; the queries of a document are the last of its tokens.
`window` is None where it would hide nothing.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from megatune.ops.attention_blocks import (
    Block,
    flash_width,
    flash_with_sinks,
    for_flash,
    hidden_mask,
    widened,
)
from megatune.ops.checks import accumulate_dtype
from megatune.ops.registry import inductor_problem
from megatune.ops.segments import Segments


def one_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """(q, k, v with zeros up to the wider one's head size, that of v): for kernels that know only one."""
    width = max(q.shape[2], v.shape[2])
    return widened(q, width), widened(k, width), widened(v, width), v.shape[2]


def _hidden(queries: int, total: int, window: int | None, device: torch.device) -> Tensor:
    """bool [queries, total], true where the query (the last `queries` of `total` tokens) must not see the key."""
    return hidden_mask(queries, total, None if window is None else window - 1, 0, device)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    keys: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One document after the other, all scores at once, in fp32 (fp64 for fp64)."""
    outputs = [
        _dense(*document, scale, window, softcap, sinks)
        for document in zip(
            q.split(segments.lengths), k.split(keys.lengths), v.split(keys.lengths), strict=True
        )
    ]
    return torch.cat(outputs)


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One document: q [L, Q, D], k [M, K, D] and v [M, K, Dv] with M >= L."""
    length, heads, dim = q.shape
    total, kv_heads, _ = k.shape
    wide = accumulate_dtype(q.dtype)
    grouped = q.to(wide).reshape(length, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("lkgd,mkd->kglm", grouped, k.to(wide)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(_hidden(length, total, window, q.device), float("-inf"))
    if sinks is not None:
        sink = sinks.to(wide).reshape(kv_heads, heads // kv_heads, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), -1)
    probabilities = torch.softmax(scores, -1)[..., :total]
    return torch.einsum("kglm,mkd->lkgd", probabilities, v.to(wide)).flatten(1, 2).to(q.dtype)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    keys: Segments,
    scale: float,
    window: int | None,
    softcap: None,
    sinks: None,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, one document after the other."""
    q, k, v, value_dim = one_width(q, k, v)  # its fast kernels know one
    grouped = q.shape[1] != k.shape[1]
    outputs = []
    for document in zip(q.split(segments.lengths), k.split(keys.lengths), v.split(keys.lengths), strict=True):
        length, total = document[0].shape[0], document[1].shape[0]
        # SDPA's own causal mask aligns the first query with the first key, ours the last with the last.
        causal = length == total and (window is None or window >= length)
        mask = None
        if not causal and (length > 1 or window is not None):
            mask = ~_hidden(length, total, window, q.device)
        heads_first = (part.transpose(0, 1).unsqueeze(0) for part in document)
        out = F.scaled_dot_product_attention(
            *heads_first, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
        outputs.append(out.squeeze(0).transpose(0, 1))
    out = torch.cat(outputs) if len(outputs) > 1 else outputs[0].contiguous()
    return out[..., :value_dim]


@cache
def _varlen_parameters() -> tuple[str, ...]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return ()
    return tuple(inspect.signature(varlen_attn).parameters)


def varlen_problem() -> str | None:
    """Why PyTorch's attention for packed documents cannot be used here, None if it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if not {"scale", "window_size"} <= set(_varlen_parameters()):
        return f"torch {torch.__version__} has no varlen_attn with a scale"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than Ampere"
    return None


def varlen_features() -> tuple[str, ...]:
    """What this torch's varlen_attn can do beyond plain causal attention."""
    return ("window", "cache", "sinks") if "window_size" in _varlen_parameters() else ("cache",)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    keys: Segments,
    scale: float,
    window: int | None,
    softcap: None,
    sinks: Tensor | None,
) -> Tensor:
    """torch.nn.attention.varlen (FlashAttention 2 for packed documents)."""
    from torch.nn.attention.varlen import varlen_attn

    left = None if window is None else window - 1  # FlashAttention counts the tokens before the query
    if sinks is not None:
        block = Block(segments.lengths, keys.lengths, segments.cu_seqlens, keys.cu_seqlens, left, 0)
        return flash_with_sinks(q, k, v, sinks, block, scale)
    grouped = {"enable_gqa": True} if "enable_gqa" in _varlen_parameters() else {}
    width = flash_width(q, v)
    out = varlen_attn(
        *(for_flash(x, width) for x in (q, k, v)),
        segments.cu_seqlens,
        keys.cu_seqlens,
        segments.max_seqlen,
        keys.max_seqlen,
        scale=scale,
        window_size=(-1 if left is None else left, 0),
        **grouped,
    )
    return out[..., : v.shape[2]]


def flex_problem() -> str | None:
    """Why flex_attention cannot be used here, None if it can."""
    return inductor_problem()


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


# Block masks are made once for a micro-batch and used by all layers with the same window.
_BLOCK_MASKS: WeakKeyDictionary[Segments, dict[int | None, Any]] = WeakKeyDictionary()


def _block_mask(segments: Segments, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    masks = _BLOCK_MASKS.setdefault(segments, {})
    if window not in masks:
        tokens, device = segments.tokens, segments.positions.device
        lengths = segments.cu_seqlens.diff().long()
        document = torch.repeat_interleave(
            torch.arange(lengths.shape[0], device=device), lengths, output_size=tokens
        )

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = (document[query] == document[key]) & (query >= key)
            return seen if window is None else seen & (query - key < window)

        masks[window] = create_block_mask(visible, None, None, tokens, tokens, device=device)
    return masks[window]


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    keys: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """torch.nn.attention.flex_attention, compiled, with a block mask that skips what no query sees."""

    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    heads_first = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))
    out = _compiled_flex()(
        *heads_first,
        score_mod=None if softcap is None else cap,
        block_mask=_block_mask(segments, window),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.squeeze(0).transpose(0, 1).contiguous()
