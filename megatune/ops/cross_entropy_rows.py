"""What computes a cross-entropy from logits, for a whole vocabulary and for some columns of one: operators and bodies.

With z the logits (after the cap) and l = logsumexp(z), a row's loss is

    weight * (l - (1 - smoothing) * z[label] - smoothing * mean(z) + z_loss * l^2)

and 0 where the label is `ignore`; its gradient, weight * ((1 + 2 * z_loss * l) * softmax(z) - (1 - smoothing) * [label]
- smoothing / V) times the cap's slope, takes the place of the logits. Label smoothing: arXiv:1512.00567; the loss on l:
arXiv:2204.02311, section 5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatune.ops.checks import accumulate_dtype
from megatune.ops.registry import Body, add_op, compiled_body, cpu_body, cuda_body, define, fuse, nothing

IGNORED = -100  # the label that has no loss, as in PyTorch
OPTIONS = f"Tensor? weights=None, float z_loss=0.0, float smoothing=0.0, int ignore={IGNORED}"


def _row_losses(
    largest: Tensor,
    total: Tensor,
    target: Tensor,
    mean: Tensor | None,
    labels: Tensor,
    weights: Tensor | None,
    z_loss: float,
    smoothing: float,
    ignore: int,
) -> Tensor:
    """Loss [rows] from the largest logit, the sum of exp(logit - largest), the label's logit and (for smoothing) the
    mean of the logits. A difference of logits is exact where they are near each other, their logsumexp is rounded."""
    log_total = torch.log(total)
    loss = log_total + (largest - target)
    if mean is not None:
        loss = loss + smoothing * (target - mean)
    if z_loss:
        loss = loss + z_loss * (largest + log_total).square()
    if weights is not None:
        loss = loss * weights
    return torch.where(labels == ignore, 0.0, loss)


def _factors(
    largest: Tensor, total: Tensor, labels: Tensor, weights: Tensor | None, z_loss: float, ignore: int
) -> tuple[Tensor, Tensor]:
    """What a row's exp(logit - largest), and what its targets are multiplied by in the gradient: [rows, 1] each."""
    of_targets = (labels != ignore).to(total.dtype)
    if weights is not None:
        of_targets = of_targets * weights
    of_softmax = of_targets * (1 + 2 * z_loss * (largest + torch.log(total))) if z_loss else of_targets
    return (of_softmax / total)[:, None], of_targets[:, None]


def _capped(x: Tensor, softcap: float) -> tuple[Tensor, Tensor | None]:
    """(cap * tanh(x / cap), that tanh); without a cap (x, None)."""
    if not softcap:
        return x, None
    part = torch.tanh(x / softcap)
    return softcap * part, part


def _times_slope(grad: Tensor, part: Tensor | None) -> Tensor:
    """grad times the derivative of `_capped`, from its tanh. (Of 1 - tanh^2, the square would be rounded before the
    difference, which shows it near 1.)"""
    return grad if part is None else grad * ((1 - part) * (1 + part))


def _row_sums(x: Tensor) -> Tensor:
    """x.sum(1). A kernel that torch.compile makes for any size may add up all of a long row one number after the other,
    where the first row that it was for was a short one: in fp64. Eager sums are pairwise."""
    if torch.compiler.is_compiling():
        return x.sum(1, dtype=torch.float64).to(x.dtype)
    return x.sum(1)


def _reference(
    logits: Tensor,
    labels: Tensor,
    softcap: float,
    write_grad: bool,
    weights: Tensor | None = None,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
    ignore: int = IGNORED,
) -> Tensor:
    """logits [rows, V], labels int64 [rows], weights fp32 [rows] -> loss fp32 [rows]; with write_grad the logits become
    their gradient. softcap 0: none; else logits count as cap * tanh(logit / cap)."""
    capped, part = _capped(logits.to(accumulate_dtype(logits.dtype)), softcap)
    index = torch.where(labels == ignore, 0, labels)[:, None]
    largest = capped.amax(1)
    powers = torch.exp(capped - largest[:, None])
    total = powers.sum(1)
    mean = capped.mean(1) if smoothing else None
    target = capped.gather(1, index).squeeze(1)
    if write_grad:
        of_softmax, of_targets = _factors(largest, total, labels, weights, z_loss, ignore)
        wanted = torch.full_like(capped, smoothing / logits.shape[1])
        wanted.scatter_add_(1, index, torch.full_like(of_targets, 1 - smoothing))
        grad = _times_slope(powers.mul_(of_softmax).sub_(wanted.mul_(of_targets)), part)
        logits.copy_(torch.where(labels[:, None] == ignore, 0.0, grad))
    return _row_losses(largest, total, target, mean, labels, weights, z_loss, smoothing, ignore)


def _losses(
    logits: Tensor,
    labels: Tensor,
    softcap: float,
    write_grad: bool,
    weights: Tensor | None,
    z_loss: float,
    smoothing: float,
    ignore: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [rows], gradient of the label's own logit [rows, 1], its column [rows, 1]); with write_grad the logits
    become the gradient that they would have if they were not the label's: two passes over the logits and no more."""
    wide = accumulate_dtype(logits.dtype)
    index = torch.where(labels == ignore, 0, labels)[:, None]
    capped, part = _capped(logits.to(wide), softcap)
    target, target_part = _capped(logits.gather(1, index).to(wide), softcap)
    largest = capped.amax(1)
    total = _row_sums(torch.exp(capped - largest[:, None]))
    mean = _row_sums(capped) / logits.shape[1] if smoothing else None
    of_softmax, of_targets = _factors(largest, total, labels, weights, z_loss, ignore)
    even = smoothing / logits.shape[1]
    own = torch.exp(target - largest[:, None]) * of_softmax - (1 - smoothing + even) * of_targets
    own = _times_slope(own, target_part)
    if write_grad:
        grad = torch.exp(capped - largest[:, None]) * of_softmax
        if smoothing:
            grad = grad - even * of_targets
        logits.copy_(torch.where(labels[:, None] == ignore, 0.0, _times_slope(grad, part)))
    loss = _row_losses(largest, total, target.squeeze(1), mean, labels, weights, z_loss, smoothing, ignore)
    return loss, torch.where(labels[:, None] == ignore, 0.0, own), index


_FUSED_LOSSES = fuse(_losses)


def _compiled(
    logits: Tensor,
    labels: Tensor,
    softcap: float,
    write_grad: bool,
    weights: Tensor | None = None,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
    ignore: int = IGNORED,
) -> Tensor:
    loss, own, index = _FUSED_LOSSES(logits, labels, softcap, write_grad, weights, z_loss, smoothing, ignore)
    if write_grad:
        logits.scatter_(1, index, own.to(logits.dtype))
    return loss


def _fake(
    logits: Tensor,
    labels: Tensor,
    softcap: float,
    write_grad: bool,
    weights: Tensor | None = None,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
    ignore: int = IGNORED,
) -> Tensor:
    return logits.new_empty(labels.shape, dtype=accumulate_dtype(logits.dtype))


_ROWS = define(
    f"cross_entropy_rows(Tensor(a!) logits, Tensor labels, float softcap, bool write_grad, {OPTIONS}) -> Tensor",
    _reference,
    _fake,
)


def _scale_gradient(out: Tensor, x: Tensor, factor: Tensor) -> None:
    """out = x * factor, [rows, width]; out is x itself, or has its dtype, or a narrower one. factor: one number."""
    torch.mul(x, factor, out=out)


_SCALE = define(
    "scale_gradient(Tensor(a!) out, Tensor x, Tensor factor) -> ()",
    _scale_gradient,
    nothing,
)
# Of each body: losses of rows, and what backward does with the gradient.
ROWS_OP = add_op(
    "linear_cross_entropy",
    [
        cpu_body(_ROWS, _scale_gradient),
        cuda_body(_ROWS, _SCALE),
        compiled_body(_compiled, _scale_gradient),
        Body("reference", (_reference, _scale_gradient)),
    ],
)


def _split_sums(
    logits: Tensor,
    labels: Tensor,
    first: int,
    size: int,
    softcap: float,
    with_sum: bool = False,
    ignore: int = IGNORED,
) -> Tensor:
    """What the other processes need of these columns, which are from `first` on in a vocabulary of `size`: fp32 [rows,
    3], largest logit, sum of exp(logit - largest), the label's logit (0 where it is not here), and `with_sum` also the
    sum of the logits [rows, 4]. A label that no process has is an index out of range, as on one process."""
    wide = accumulate_dtype(logits.dtype)
    capped, here = _capped(logits.to(wide), softcap)[0], labels - first
    mine = (here >= 0) & (here < logits.shape[1])
    elsewhere = ~mine & (labels >= 0) & (labels < size) | (labels == ignore)
    own = logits.gather(1, torch.where(elsewhere, 0, here)[:, None]).squeeze(1)
    target, _ = _capped(own.to(wide), softcap)
    # Finite, so that columns that are all -infinity here add 0 to those elsewhere.
    largest = capped.amax(1).clamp_min(torch.finfo(wide).min)
    total = _row_sums(torch.exp(capped - largest[:, None]))
    found = [largest, total, torch.where(mine, target, 0.0)]
    return torch.stack([*found, _row_sums(capped)] if with_sum else found, 1)


def _split_join(
    sums: Tensor,
    labels: Tensor,
    size: int,
    weights: Tensor | None = None,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
    ignore: int = IGNORED,
) -> tuple[Tensor, Tensor]:
    """What all have sent [processes, rows, 3 or 4] -> losses [rows]; over all columns, the largest logit and the sum of
    exp(logit - largest) [rows, 2]."""
    largest, total, target, *plain = sums.unbind(2)
    top = largest.amax(0)
    whole = (total * torch.exp(largest - top)).sum(0)
    mean = plain[0].sum(0) / size if plain else None
    losses = _row_losses(top, whole, target.sum(0), mean, labels, weights, z_loss, smoothing, ignore)
    return losses, torch.stack((top, whole), 1)


def _split_grad(
    logits: Tensor,
    labels: Tensor,
    first: int,
    size: int,
    softcap: float,
    joined: Tensor,
    weights: Tensor | None = None,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
    ignore: int = IGNORED,
) -> None:
    """The logits of these columns become their gradient; `joined`: of all columns, as `_split_join` gives it."""
    largest, total = joined.unbind(1)
    capped, part = _capped(logits.to(joined.dtype), softcap)
    of_softmax, of_targets = _factors(largest, total, labels, weights, z_loss, ignore)
    columns = torch.arange(logits.shape[1], device=logits.device)
    wanted = ((labels - first)[:, None] == columns).to(joined.dtype)
    if smoothing:
        wanted = wanted * (1 - smoothing) + smoothing / size
    grad = torch.exp(capped - largest[:, None]) * of_softmax - wanted * of_targets
    logits.copy_(torch.where(labels[:, None] == ignore, 0.0, _times_slope(grad, part)))


def _fake_sums(
    logits: Tensor,
    labels: Tensor,
    first: int,
    size: int,
    softcap: float,
    with_sum: bool = False,
    ignore: int = IGNORED,
) -> Tensor:
    return logits.new_empty((labels.shape[0], 4 if with_sum else 3), dtype=accumulate_dtype(logits.dtype))


_SUMS = define(
    "cross_entropy_sums(Tensor logits, Tensor labels, int first, int size, float softcap, bool with_sum=False, "
    f"int ignore={IGNORED}) -> Tensor",
    _split_sums,
    _fake_sums,
)


def _fake_join(sums: Tensor, labels: Tensor, size: int, *options: Any) -> tuple[Tensor, Tensor]:
    return sums.new_empty(labels.shape), sums.new_empty(labels.shape[0], 2)


_JOIN = define(
    f"cross_entropy_join(Tensor sums, Tensor labels, int size, {OPTIONS}) -> (Tensor, Tensor)",
    _split_join,
    _fake_join,
)
_GRAD = define(
    "cross_entropy_grad(Tensor(a!) logits, Tensor labels, int first, int size, float softcap, Tensor joined, "
    f"{OPTIONS}) -> ()",
    _split_grad,
    nothing,
)
# Of each body: what a process sends, what comes of what all have sent, the gradient.
SPLIT_OP = add_op(
    "split_cross_entropy",
    [
        cuda_body(_SUMS, _JOIN, _GRAD),
        compiled_body(fuse(_split_sums), fuse(_split_join), fuse(_split_grad)),
        Body("reference", (_split_sums, _split_join, _split_grad)),
    ],
)
