"""Head projection and cross-entropy in one op: the logits of all tokens never exist at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatune.ops.checks import accumulate_dtype, floating, same_device
from megatune.ops.comm import all_gather
from megatune.ops.registry import Body, add_op, compiled_body, cpu_body, define, fuse

# Logits in one chunk, unless the caller says how many rows: 128 MiB in bf16 on a CPU, 512 MiB elsewhere, where small
# products do not fill the device.
CHUNK_LOGITS = {"cpu": 2**26}
CHUNK_LOGITS_ELSEWHERE = 2**28


@dataclass(frozen=True, eq=False)
class VocabCut:
    """A vocabulary of `size` rows whose rows from `first` on are here, the others in the other processes of `group`;
    all call at the same time, with the same rows and labels."""

    first: int
    size: int
    group: dist.ProcessGroup


def _reference(logits: Tensor, labels: Tensor, softcap: float, write_grad: bool) -> Tensor:
    """logits [rows, V], labels int64 [rows] -> loss fp32 [rows]; with write_grad the logits become their gradient.

    softcap 0: none; else logits count as cap * tanh(logit / cap).
    """
    capped = logits.to(accumulate_dtype(logits.dtype))
    if softcap:
        capped = softcap * torch.tanh(capped / softcap)
    log_sum = torch.logsumexp(capped, 1)
    loss = log_sum - capped.gather(1, labels[:, None]).squeeze(1)
    if write_grad:
        grad = torch.exp(capped - log_sum[:, None])
        grad = grad - torch.zeros_like(grad).scatter_(1, labels[:, None], 1.0)
        if softcap:
            grad = grad * (1 - (capped / softcap).square())
        logits.copy_(grad)
    return loss


def _losses(logits: Tensor, labels: Tensor, softcap: float, write_grad: bool) -> tuple[Tensor, Tensor]:
    """(loss [rows], gradient of the label's own logit [rows]); with write_grad the logits become probabilities
    (times the cap's slope): two passes over the logits and no more."""
    wide = accumulate_dtype(logits.dtype)
    capped, target = logits.to(wide), logits.gather(1, labels[:, None]).squeeze(1).to(wide)
    if softcap:
        capped, target = (softcap * torch.tanh(x / softcap) for x in (capped, target))
    log_sum = torch.logsumexp(capped, 1)
    own = torch.exp(target - log_sum) - 1
    if softcap:
        own = own * (1 - (target / softcap).square())
    if write_grad:
        grad = torch.exp(capped - log_sum[:, None])
        logits.copy_(grad * (1 - (capped / softcap).square()) if softcap else grad)
    return log_sum - target, own


_FUSED_LOSSES = fuse(_losses)


def _compiled(logits: Tensor, labels: Tensor, softcap: float, write_grad: bool) -> Tensor:
    loss, own = _FUSED_LOSSES(logits, labels, softcap, write_grad)
    if write_grad:
        logits.scatter_(1, labels[:, None], own[:, None].to(logits.dtype))
    return loss


def _fake(logits: Tensor, labels: Tensor, softcap: float, write_grad: bool) -> Tensor:
    return logits.new_empty(labels.shape, dtype=accumulate_dtype(logits.dtype))


_ROWS = define(
    "cross_entropy_rows(Tensor(a!) logits, Tensor labels, float softcap, bool write_grad) -> Tensor",
    _reference,
    _fake,
)
_OP = add_op(
    "linear_cross_entropy", [cpu_body(_ROWS), compiled_body(_compiled), Body("reference", (_reference,))]
)


def _split_sums(logits: Tensor, labels: Tensor, first: int, size: int, softcap: float) -> Tensor:
    """What the other processes need of these columns: fp32 [rows, 3], largest logit, sum of exp(logit - largest), the
    label's logit (0 where it is not here). A label that no process has is an index out of range, as on one process."""
    capped = logits.to(accumulate_dtype(logits.dtype))
    here = labels - first
    mine = (here >= 0) & (here < logits.shape[1])
    elsewhere = ~mine & (labels >= 0) & (labels < size)
    target = capped.gather(1, torch.where(elsewhere, 0, here)[:, None]).squeeze(1)
    if softcap:
        capped, target = (softcap * torch.tanh(x / softcap) for x in (capped, target))
    largest = capped.amax(1)
    total = torch.exp(capped - largest[:, None]).sum(1)
    return torch.stack((largest, total, torch.where(mine, target, 0.0)), 1)


def _split_grad(logits: Tensor, labels: Tensor, first: int, softcap: float, log_sum: Tensor) -> None:
    """The logits of these columns become their gradient, from the log of the sum over all columns [rows]."""
    capped = logits.to(log_sum.dtype)
    if softcap:
        capped = softcap * torch.tanh(capped / softcap)
    columns = torch.arange(logits.shape[1], device=logits.device)
    grad = torch.exp(capped - log_sum[:, None]) - ((labels - first)[:, None] == columns).to(log_sum.dtype)
    if softcap:
        grad = grad * (1 - (capped / softcap).square())
    logits.copy_(grad)


_SPLIT_OP = add_op(
    "split_cross_entropy",
    [compiled_body(fuse(_split_sums), fuse(_split_grad)), Body("reference", (_split_sums, _split_grad))],
)


def _split_rows(logits: Tensor, labels: Tensor, softcap: float, write_grad: bool, cut: VocabCut) -> Tensor:
    """As the bodies of `linear_cross_entropy`, for some columns [rows, V here] of the logits. Three numbers a row are
    sent."""
    sums, grad = _SPLIT_OP.pick(logits.device.type, logits.dtype).run
    mine = sums(logits, labels, cut.first, cut.size, softcap)
    size = dist.get_world_size(cut.group)
    everyone = mine.new_empty(size * mine.shape[0], 3)
    all_gather(everyone, mine, group=cut.group)
    largest, total, target = everyone.view(size, -1, 3).unbind(2)
    top = largest.amax(0)
    log_sum = top + torch.log((total * torch.exp(largest - top)).sum(0))
    if write_grad:
        grad(logits, labels, cut.first, softcap, log_sum)
    return log_sum - target.sum(0)


class _LinearCrossEntropy(torch.autograd.Function):
    """hidden [S, H], weight [V, H], labels [S] -> scalar. Saved: the finished gradients, of hidden (and of the weight
    if it is trained), so that backward only scales them: three matrix products instead of four."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        softcap: float,
        chunk: int,
        cut: VocabCut | None,
        train: bool,
    ) -> Tensor:
        grads_wanted = tuple(wanted and train for wanted in ctx.needs_input_grad[:2])
        loss, *grads = _forward(hidden, weight, labels, softcap, chunk, cut, *grads_wanted)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if saved is None else saved * grad for saved in ctx.saved_tensors)
        return *scaled, None, None, None, None, None


def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    softcap: float,
    chunk: int,
    cut: VocabCut | None,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(loss, gradient of hidden or None, gradient of weight or None)."""
    if cut is None:
        rows_loss = _OP.pick(hidden.device.type, hidden.dtype).run[0]
    else:
        rows_loss = partial(_split_rows, cut=cut)
    head = weight.to(hidden.dtype)
    grad_hidden = torch.empty_like(hidden) if hidden_grad else None
    total = None  # gradient of the weight, summed over chunks in fp32
    loss = hidden.new_zeros((), dtype=accumulate_dtype(hidden.dtype))
    buffer = hidden.new_empty(min(chunk, hidden.shape[0]), weight.shape[0])
    for start in range(0, hidden.shape[0], chunk):
        rows = hidden[start : start + chunk]
        logits = torch.mm(rows, head.t(), out=buffer[: rows.shape[0]])
        losses = rows_loss(logits, labels[start : start + chunk], softcap, hidden_grad or weight_grad)
        loss = loss + losses.sum()
        if grad_hidden is not None:
            torch.mm(logits, head, out=grad_hidden[start : start + chunk])
        if weight_grad:
            total = _add_product(total, logits, rows, single=hidden.shape[0] <= chunk)
    if weight_grad:
        total = torch.zeros_like(weight) if total is None else total.to(weight.dtype)
    return loss, grad_hidden, total


def _add_product(total: Tensor | None, grad_logits: Tensor, rows: Tensor, single: bool) -> Tensor:
    """total + grad_logits^T @ rows, in fp32 where several chunks are summed."""
    if total is None:
        product = grad_logits.t() @ rows
        return product if single else product.to(accumulate_dtype(rows.dtype))
    if total.dtype == rows.dtype:
        return total.addmm_(grad_logits.t(), rows)
    return total.add_(grad_logits.t() @ rows)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    chunk: int | None = None,
    cut: VocabCut | None = None,
) -> Tensor:
    """Sum over rows of -log softmax(cap(hidden @ weight^T))[label].

    hidden [S, H] (the scored rows only), weight [V, H], labels int64 [S], each in [0, V) -> scalar, fp32 (fp64 for
    fp64 inputs). Products in hidden's dtype, softmax and sums in fp32. `softcap`: logits become
    cap * tanh(logit / cap). `chunk`: rows whose logits exist at the same time (default: by memory). The gradients
    are computed in the forward pass, for what requires them and where autograd is on.

    `cut`: the weight is some rows [V here, H] of a larger vocabulary, and labels are in that one. Every process gets
    the whole loss; its gradient of hidden is the part that comes from its rows (the sum over the group is the whole),
    and logits are never gathered. ValueError where shapes, dtypes or devices do not fit.
    """
    op = "linear_cross_entropy"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{op}: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [S, H], [V, H]"
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"{op}: labels {labels.dtype} {tuple(labels.shape)} must be int64 [{hidden.shape[0]}]"
        )
    if (softcap is not None and softcap <= 0) or (chunk is not None and chunk < 1):
        raise ValueError(f"{op}: softcap ({softcap}) and chunk ({chunk}) must be positive")
    floating(op, hidden=hidden, weight=weight)
    same_device(op, hidden, weight=weight, labels=labels)
    rows = weight.shape[0]
    if cut is not None:
        # The same everywhere, though some have fewer rows than others.
        rows = cut.size // dist.get_world_size(cut.group)
    if chunk is None:
        logits = CHUNK_LOGITS.get(hidden.device.type, CHUNK_LOGITS_ELSEWHERE)
        chunk = max(1, logits // max(1, rows))
    return _LinearCrossEntropy.apply(
        hidden, weight, labels.contiguous(), softcap or 0.0, chunk, cut, torch.is_grad_enabled()
    )
