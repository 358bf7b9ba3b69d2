"""Attention between pieces of queries and pieces of keys, with its log-sum-exp: what ring attention is made of.

Softmax over keys that come piece by piece: each piece gives its output and the log of its sum of exponentials, and
two of these join exactly (arXiv:2310.01889, arXiv:2205.14135). The gradient of one piece needs the output and the
log-sum-exp over all keys, which the caller has by then. Sinks (a learned logit per head without a value, as in gpt-oss;
after arXiv:2309.17453) are one more piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatune.ops.checks import accumulate_dtype
from megatune.ops.registry import Body, add_op

HALF = (torch.bfloat16, torch.float16)
# The reference computes this many scores at once (64 MiB in fp32).
_SCORES = 1 << 24


@dataclass(frozen=True, eq=False)
class Block:
    """Pieces of queries and of keys, lengths in order: piece i of the queries meets piece i of the keys.

    Counted from the last query and the last key of a piece, key b is seen by query a where
    a - left <= b <= a + right; None: no limit. (0 to the right and pieces of one length: causal.) Every query must see
    a key. `cu_queries`, `cu_keys`: int32 [pieces + 1], cumulative lengths on the device.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    cu_queries: Tensor
    cu_keys: Tensor
    left: int | None = None
    right: int | None = None


def hidden_mask(
    queries: int, keys: int, left: int | None, right: int | None, device: torch.device
) -> Tensor | None:
    """bool [queries, keys], true where the query must not see the key (`Block`); None where all see all."""
    if left is None and right is None:
        return None
    query_at = torch.arange(keys - queries, keys, device=device)[:, None]
    distance = torch.arange(keys, device=device) - query_at
    hidden = torch.zeros_like(distance, dtype=torch.bool) if right is None else distance > right
    return hidden if left is None else hidden | (distance < -left)


def _parts(block: Block, heads: int, device: torch.device) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """(rows of the queries, rows of the keys, what is hidden), each of a bounded number of scores."""
    query_start = key_start = 0
    for queries, keys in zip(block.queries, block.keys, strict=True):
        rows = max(1, _SCORES // (heads * keys))
        for start in range(0, queries, rows):
            stop = min(start + rows, queries)
            # The last rows of `start .. queries` are left out: their place counts from the end.
            right = None if block.right is None else block.right - (queries - stop)
            left = None if block.left is None else block.left + (queries - stop)
            hidden = hidden_mask(stop - start, keys, left, right, device)
            yield (
                slice(query_start + start, query_start + stop),
                slice(key_start, key_start + keys),
                hidden,
            )
        query_start += queries
        key_start += keys


def _scores(
    q: Tensor, k: Tensor, hidden: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """q [L, K, G, D], k [M, K, D] -> (scores [K, G, L, M], slope of the cap or None)."""
    scores = torch.einsum("lkgd,mkd->kglm", q, k) * scale
    slope = None
    if softcap is not None:
        tanh = torch.tanh(scores / softcap)
        scores, slope = softcap * tanh, 1 - tanh.square()
    return (scores if hidden is None else scores.masked_fill(hidden, float("-inf"))), slope


def reference(
    q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(out [A, Q, Dv], log-sum-exp [Q, A]), both in fp32 (fp64 for fp64)."""
    wide, kv_heads = accumulate_dtype(q.dtype), k.shape[1]
    out = q.new_empty((*q.shape[:2], v.shape[2]), dtype=wide)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=wide)
    for rows, keys, hidden in _parts(block, q.shape[1], q.device):
        grouped = q[rows].to(wide).unflatten(1, (kv_heads, -1))
        scores, _ = _scores(grouped, k[keys].to(wide), hidden, scale, softcap)
        log_sum = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - log_sum[..., None])
        out[rows] = torch.einsum("kglm,mkd->lkgd", weights, v[keys].to(wide)).flatten(1, 2)
        lse[:, rows] = log_sum.flatten(0, 1)
    return out, lse


def reference_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block: Block,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradients of q, k, v) in fp32. With p the probabilities: ds = p * (grad v^T - rowsum(grad * out))."""
    wide, kv_heads = accumulate_dtype(q.dtype), k.shape[1]
    grad_q, grad_k, grad_v = (x.new_zeros(x.shape, dtype=wide) for x in (q, k, v))
    for rows, keys, hidden in _parts(block, q.shape[1], q.device):
        q_part, grad_part, out_part = (x[rows].to(wide).unflatten(1, (kv_heads, -1)) for x in (q, grad, out))
        k_part, v_part = k[keys].to(wide), v[keys].to(wide)
        scores, slope = _scores(q_part, k_part, hidden, scale, softcap)
        weights = torch.exp(scores - lse[:, rows].reshape(scores.shape[:-1])[..., None])
        delta = (grad_part * out_part).sum(-1).permute(1, 2, 0)[..., None]
        grad_scores = weights * (torch.einsum("lkgd,mkd->kglm", grad_part, v_part) - delta) * scale
        if slope is not None:
            grad_scores = grad_scores * slope
        grad_q[rows] = torch.einsum("kglm,mkd->lkgd", grad_scores, k_part).flatten(1, 2)
        grad_k[keys] += torch.einsum("kglm,lkgd->mkd", grad_scores, q_part)
        grad_v[keys] += torch.einsum("kglm,lkgd->mkd", weights, grad_part)
    return grad_q, grad_k, grad_v


def flash_problem() -> str | None:
    """Why FlashAttention cannot be used here, None if it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than Ampere"
    return None


def widened(x: Tensor, width: int) -> Tensor:
    """x with zeros behind its last dimension, up to `width`."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def for_flash(x: Tensor, width: int) -> Tensor:
    """x as the kernel reads it: 16 bytes at a time, so rows and heads start at multiples of that."""
    x = widened(x, width)
    if x.stride(-1) == 1 and not any(step % 8 for step in (*x.stride()[:-1], x.storage_offset())):
        return x
    return x.contiguous()


def flash_width(q: Tensor, v: Tensor) -> int:
    """The kernel knows one width of q, k and v, a multiple of 8."""
    return -(-max(q.shape[2], v.shape[2]) // 8) * 8


def _flash_window(block: Block) -> dict[str, int]:
    limits = {"window_size_left": block.left, "window_size_right": block.right}
    return {name: -1 if limit is None else limit for name, limit in limits.items()}


def _is_causal(block: Block) -> bool:
    return block.left is None and block.right == 0


def flash(
    q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float, softcap: None
) -> tuple[Tensor, Tensor]:
    """(out [A, Q, Dv] like q, log-sum-exp [Q, A] in fp32)."""
    width = flash_width(q, v)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(for_flash(x, width) for x in (q, k, v)),
        block.cu_queries,
        block.cu_keys,
        max(block.queries),
        max(block.keys),
        0.0,  # dropout
        _is_causal(block),
        False,  # return_debug_mask
        scale=scale,
        **_flash_window(block),
    )
    return out[..., : v.shape[2]], lse


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block: Block,
    scale: float,
    softcap: None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradients of q, k, v) of their dtype."""
    width = flash_width(q, v)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    grad_q, grad_k, grad_v = torch.ops.aten._flash_attention_backward(
        *(for_flash(x, width) for x in (grad, q, k, v, out)),
        lse.contiguous(),
        block.cu_queries,
        block.cu_keys,
        max(block.queries),
        max(block.keys),
        0.0,
        _is_causal(block),
        no_dropout,
        torch.empty(0, device=q.device),
        scale=scale,
        **_flash_window(block),
    )
    dim, value_dim = q.shape[2], v.shape[2]
    return grad_q[..., :dim], grad_k[..., :dim], grad_v[..., :value_dim]


_OP = add_op(
    "attention_block",
    [
        Body("flash", (flash, flash_backward), ("cuda",), HALF, (), problem=flash_problem),
        Body("reference", (reference, reference_backward)),
    ],
)


def _body(q: Tensor, softcap: float | None) -> Any:
    return _OP.pick(q.device.type, q.dtype, () if softcap is None else ("softcap",)).run


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, block: Block, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v over the keys of one block, without autograd.

    q [A, Q, D], k [B, K, D], v [B, K, Dv] -> (out [A, Q, Dv] of q's dtype or wider, log-sum-exp [Q, A] in fp32, fp64
    for fp64). Query head h reads head h // (Q / K). `softcap` as in `attention`.
    """
    return _body(q, softcap)[0](q, k, v, block, scale, softcap)


def block_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block: Block,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What these keys add to the gradients of q, and the gradients of k and v from these queries.

    `grad` and `out` [A, Q, Dv] and `lse` [Q, A] are those of the whole softmax: over all keys that the queries see,
    this block's and others'. The results are of the inputs' dtype or wider.
    """
    return _body(q, softcap)[1](grad, q, k, v, out, lse, block, scale, softcap)


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of softmax over the keys -> over these and one more logit per head, `sinks` [Q], whose value is 0."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    return (out * torch.exp(lse - total).t()[..., None]).to(out.dtype), total


def sinks_gradient(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Gradient [Q] of the sinks, -p * sum(grad * out) with p their probability; `out` and `lse` count them in."""
    wide = lse.dtype
    delta = (grad.to(wide) * out.to(wide)).sum(-1).t()
    weights = torch.exp(sinks.to(wide)[:, None] - lse)
    return -(weights * delta).sum(1).to(sinks.dtype)


class _SunkAttention(torch.autograd.Function):
    """q [A, Q, D], k [B, K, D], v [B, K, Dv], sinks [Q] -> [A, Q, Dv]. Saved: these, the output and its log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, block: Block, scale: float
    ) -> Tensor:
        out, lse = add_sinks(*flash(q, k, v, block, scale, None), sinks)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.block, ctx.scale = block, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        grads = flash_backward(grad, q, k, v, out, lse, ctx.block, ctx.scale, None)
        return *grads, sinks_gradient(grad, out, lse, sinks), None, None


def flash_with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, block: Block, scale: float) -> Tensor:
    """Attention of one block with sinks, by FlashAttention, differentiable: [A, Q, Dv]."""
    return _SunkAttention.apply(q, k, v, sinks, block, scale)
