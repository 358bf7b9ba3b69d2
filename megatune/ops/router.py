"""The choice of experts: scores, the best k of them, their weights.

Legend: T tokens, E experts, k choices of a token.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatune.ops.checks import floating, same_device
from megatune.ops.registry import Body, add_op, cuda_problem, define

Score = Literal["softmax", "sigmoid", "topk_softmax"]
SCORES: tuple[Score, ...] = ("softmax", "sigmoid", "topk_softmax")
# What the CUDA kernel has room for; beyond, the reference runs.
MOST_EXPERTS, MOST_CHOICES, MOST_GROUPS = 512, 16, 32


def _choose(scores: Tensor, top_k: int, groups: int, groups_per_token: int) -> Tensor:
    """[T, E] -> int64 [T, k]: the best experts of the best groups; a group's score is the sum of its best two."""
    if groups_per_token < groups:
        grouped = scores.unflatten(1, (groups, -1))
        best_two = grouped.topk(min(2, grouped.shape[2]), 2).values.sum(2)
        chosen = best_two.topk(groups_per_token, 1).indices
        outside = torch.ones_like(best_two, dtype=torch.bool).scatter_(1, chosen, False)
        scores = grouped.masked_fill(outside[:, :, None], -math.inf).flatten(1)
    return scores.topk(top_k, 1).indices


def _scores(logits: Tensor, score: int) -> tuple[Tensor, Tensor]:
    """(what is chosen by and weights are made of, probabilities), both [T, E]."""
    kind = SCORES[score]
    if kind == "sigmoid":
        scores = logits.sigmoid()
        return scores, scores / scores.sum(1, keepdim=True)
    probabilities = logits.softmax(1)
    return probabilities if kind == "softmax" else logits, probabilities


def _weights(chosen: Tensor, score: int, normalise: bool, scale: float) -> Tensor:
    """Scores [T, k] of the chosen -> their weights."""
    if SCORES[score] == "topk_softmax":
        chosen = chosen.softmax(1)
    elif normalise:
        chosen = chosen / (chosen.sum(1, keepdim=True) + 1e-20)
    return chosen if scale == 1.0 else chosen * scale


def _reference(
    logits: Tensor,
    correction: Tensor | None,
    top_k: int,
    score: int,
    normalise: bool,
    scale: float,
    groups: int,
    groups_per_token: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(experts int64 [T, k], weights [T, k], probabilities [T, E])."""
    scores, probabilities = _scores(logits, score)
    corrected = scores if correction is None else scores + correction.to(scores.dtype)
    experts = _choose(corrected, top_k, groups, groups_per_token)
    weights = _weights(scores.gather(1, experts), score, normalise, scale)
    return experts, weights, probabilities


def _reference_backward(
    grad_weights: Tensor,
    grad_probabilities: Tensor | None,
    logits: Tensor,
    experts: Tensor,
    score: int,
    normalise: bool,
    scale: float,
) -> Tensor:
    """Gradient of the logits [T, E]."""
    scores, probabilities = _scores(logits, score)
    kind = SCORES[score]
    grad = grad_weights * scale
    chosen = scores.gather(1, experts)
    if kind == "topk_softmax":
        weights = chosen.softmax(1)
        grad = weights * (grad - (grad * weights).sum(1, keepdim=True))
    elif normalise:
        total = chosen.sum(1, keepdim=True) + 1e-20
        grad = (grad - (grad * (chosen / total)).sum(1, keepdim=True)) / total
    # No expert is chosen twice: what is scattered does not meet.
    of_scores = torch.zeros_like(logits).scatter_(1, experts, grad)
    of_probabilities = torch.zeros_like(logits) if grad_probabilities is None else grad_probabilities
    if kind == "softmax":
        of_probabilities = of_probabilities + of_scores
    mean = (of_probabilities * probabilities).sum(1, keepdim=True)
    if kind == "sigmoid":
        total = scores.sum(1, keepdim=True)
        return ((of_probabilities - mean) / total + of_scores) * scores * (1 - scores)
    through = (of_probabilities - mean) * probabilities
    return through + of_scores if kind == "topk_softmax" else through


def _fake(logits: Tensor, correction: Tensor | None, top_k: int, *how: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens = logits.shape[0]
    experts = logits.new_empty((tokens, top_k), dtype=torch.int64)
    return experts, logits.new_empty(tokens, top_k), logits.new_empty(logits.shape)


def _fake_backward(
    grad_weights: Tensor, grad_probabilities: Tensor | None, logits: Tensor, *how: Any
) -> Tensor:
    return logits.new_empty(logits.shape)


_FORWARD = define(
    "router(Tensor logits, Tensor? correction, int top_k, int score, bool normalise, float scale, int groups, "
    "int groups_per_token) -> (Tensor, Tensor, Tensor)",
    _reference,
    _fake,
)
_BACKWARD = define(
    "router_backward(Tensor grad_weights, Tensor? grad_probabilities, Tensor logits, Tensor experts, int score, "
    "bool normalise, float scale) -> Tensor",
    _reference_backward,
    _fake_backward,
)
_OP = add_op(
    "router",
    [
        Body("cuda", (_FORWARD, _BACKWARD), ("cuda",), (torch.float32,), problem=cuda_problem),
        Body("reference", (_reference, _reference_backward)),
    ],
)


def _body(logits: Tensor, top_k: int, groups: int) -> Body:
    fits = logits.shape[1] <= MOST_EXPERTS and top_k <= MOST_CHOICES and groups <= MOST_GROUPS
    return _OP.pick(logits.device.type, logits.dtype) if fits else _OP.bodies["reference"]


class _Router(torch.autograd.Function):
    """logits [T, E] -> experts [T, k], weights [T, k], probabilities [T, E]. `how`: as of `_reference` from `score` on.
    Saved: logits, experts."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, correction: Tensor | None, top_k: int, *how: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        score, normalise, scale, groups, _ = how
        body = _body(logits, top_k, groups)
        experts, weights, probabilities = body.run[0](logits, correction, top_k, *how)
        ctx.mark_non_differentiable(experts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, experts)
        ctx.how = body, score, normalise, scale
        return experts, weights, probabilities

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, _: None, grad_weights: Tensor | None, grad_probabilities: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits, experts = ctx.saved_tensors
        body, *how = ctx.how
        if grad_weights is None and grad_probabilities is None:
            return (None,) * 8
        if grad_weights is None:
            grad_weights = logits.new_zeros(experts.shape)
        if grad_probabilities is not None:
            grad_probabilities = grad_probabilities.contiguous()
        grad = body.run[1](grad_weights.contiguous(), grad_probabilities, logits, experts, *how)
        return grad, *(None,) * 7


def route(
    logits: Tensor,
    top_k: int,
    *,
    score: Score = "softmax",
    normalise: bool = True,
    scale: float = 1.0,
    correction: Tensor | None = None,
    groups: int = 1,
    groups_per_token: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best `top_k` experts of each token, their weights, and all probabilities.

    logits fp32 [T, E] -> experts int64 [T, k], the best first, weights fp32 [T, k], probabilities fp32 [T, E], which
    add up to 1 (softmax of the logits, or sigmoids divided by their sum). Weights are the chosen probabilities
    ("softmax"), the sigmoids ("sigmoid") or a softmax of the chosen logits ("topk_softmax"); of the first two
    `normalise` makes the sum 1; all are multiplied by `scale`. `correction` fp32 [E]: added to the scores for the
    choice alone. Experts are in `groups` groups of neighbours, and only those of the best `groups_per_token` can be
    chosen (DeepSeek-V3, arXiv:2412.19437). Of equal scores body "cuda" takes the lower number, PyTorch's top-k any. The
    choice and the correction have no gradient. ValueError where shapes, dtypes or devices do not fit.
    """
    op = "router"
    if logits.dim() != 2 or logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: logits {logits.dtype} {tuple(logits.shape)} must be fp32 [T, experts]")
    experts = logits.shape[1]
    if score not in SCORES:
        raise ValueError(f"{op}: score {score!r} must be one of {', '.join(SCORES)}")
    if groups < 1 or experts % groups or not 1 <= groups_per_token <= groups:
        raise ValueError(
            f"{op}: {experts} experts must be in equal groups, got groups {groups}, groups_per_token {groups_per_token}"
        )
    most = experts // groups * groups_per_token
    if not 1 <= top_k <= most:
        raise ValueError(f"{op}: top_k {top_k} must be from 1 to {most}, the experts that a token can have")
    if correction is not None and correction.shape != (experts,):
        raise ValueError(f"{op}: correction {tuple(correction.shape)} must be [{experts}]")
    floating(op, correction=correction)
    same_device(op, logits, correction=correction)
    if correction is not None:
        correction = correction.detach().to(logits.dtype).contiguous()
    return _Router.apply(
        logits.contiguous(),
        correction,
        top_k,
        SCORES.index(score),
        normalise,
        scale,
        groups,
        groups_per_token,
    )
