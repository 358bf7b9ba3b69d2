"""Tokens to their experts and back: sorting, products by group, weighted sums, capacity.

Legend: T tokens, k choices of each, E experts, R rows = kept choices (T * k where none is dropped). An "assignment" is
one choice of one token, number token * k + choice. Nothing here uses atomics: results do not depend on the order in
which a device's threads run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable

from megatune.ops.expert_rows import ROWS
from megatune.ops.registry import Body, add_op


def balanced_counts(rows: int, groups: int) -> tuple[int, ...]:
    """Sizes of `groups` groups of `rows` rows that are as equal as can be: what stands for the router's choice where
    tensors have no values (the planner's)."""
    share, more = divmod(rows, groups)
    return tuple(share + (group < more) for group in range(groups))


def has_values(x: Tensor) -> bool:
    """Whether the tensor holds numbers: not on meta, not in FakeTensorMode."""
    return not (x.is_meta or isinstance(x, FakeTensor))


def on_host(counts: Tensor, total: int) -> tuple[int, ...]:
    """int64 [groups], which add up to `total`, as numbers (waits for the device); balanced where there are none."""
    return tuple(counts.tolist()) if has_values(counts) else balanced_counts(total, counts.shape[0])


@dataclass(eq=False)
class Groups:
    """Rows that stand sorted by expert: `counts` int64 [E], how many each has; `rows`, all of them. `keys`: int64 [R],
    names of the tokens in the rows, for dropout; None where nobody asks."""

    counts: Tensor
    rows: int
    keys: Tensor | None = None

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """`counts` on the host; the first use waits for the device."""
        return on_host(self.counts, self.rows)

    @cached_property
    def ends(self) -> Tensor:
        """int32 [E]: the row after each expert's last."""
        return self.counts.cumsum(0).to(torch.int32)

    @cached_property
    def expert_of_row(self) -> Tensor:
        """int64 [R]."""
        experts = torch.arange(self.counts.shape[0], device=self.counts.device)
        return torch.repeat_interleave(experts, self.counts, output_size=self.rows)

    def slices(self) -> list[tuple[int, slice]]:
        """(expert, its rows) of those that have some."""
        found, start = [], 0
        for expert, size in enumerate(self.sizes):
            if size:
                found.append((expert, slice(start, start + size)))
            start += size
        return found


@dataclass(frozen=True, eq=False)
class Order:
    """Assignments sorted by expert, those of one expert in the order of the tokens.

    `source`: int64 [R], the assignment that stands in each row. `place`: int64 [T, k], the row of each assignment, R
    for one that was dropped. `groups`: the rows of each expert. `drops`: whether some may have been dropped.
    """

    source: Tensor
    place: Tensor
    groups: Groups
    drops: bool

    @property
    def tokens(self) -> Tensor:
        """int64 [R]: the token of each row."""
        return self.source // self.place.shape[1]


def sort_by_expert(experts: Tensor, num_experts: int, drops: bool = False) -> Order:
    """`experts`: int64 [T, k], the experts of each token, `num_experts` for a choice that is dropped (`drops`: whether
    there may be such; the host then waits for the device to know how many)."""
    tokens, choices = experts.shape
    ordered, source = torch.sort(experts.flatten(), stable=True)
    borders = torch.searchsorted(ordered, torch.arange(num_experts + 1, device=experts.device))
    counts = borders[1:] - borders[:-1]
    rows = tokens * choices
    place = torch.empty_like(source).scatter_(0, source, torch.arange(rows, device=source.device))
    if drops:
        rows = int(borders[-1]) if has_values(borders) else rows
        source, place = source[:rows], place.clamp(max=rows)
    return Order(source, place.view(tokens, choices), Groups(counts, rows), drops)


def within_capacity(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    """bool [T, k]: whether each choice is among the first `capacity` of its expert, by the order of the tokens.
    `experts`: int64 [T, k]; `num_experts` and above: of no expert, always within."""
    flat = experts.flatten()
    ordered, source = torch.sort(flat, stable=True)
    first = torch.searchsorted(ordered, ordered)
    within = torch.arange(flat.shape[0], device=flat.device) - first < capacity
    kept = torch.empty_like(within).scatter_(0, source, within)
    return (kept | (flat >= num_experts)).view(experts.shape)


def _rows(x: Tensor, count: int) -> tuple[Callable, ...]:
    """The functions of the op's body, for `count` rows or tokens as the other operand. Nothing to do is left to the
    reference: a compiler makes a special case of no rows."""
    few = min(x.shape[0], count) < 2
    return (ROWS.bodies["reference"] if few else ROWS.pick(x.device.type, x.dtype)).run


def _plain_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Permute(torch.autograd.Function):
    """x [T, H] -> [R, H], each token once for each of its kept choices. Backward: the sum over the choices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Order) -> Tensor:
        ctx.save_for_backward(order.place)
        ctx.drops = order.drops
        return _rows(x, order.source.shape[0])[0](_plain_rows(x), order.source, order.place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        return _rows(grad, place.shape[0])[1](_plain_rows(grad), place, None, ctx.drops), None


class _Combine(torch.autograd.Function):
    """rows [R, H], weights [T, k] -> [T, H].

    | gradient | |
    | --- | --- |
    | of rows [R, H] | that of the row's token, times the row's weight |
    | of weights [T, k] | product of the token's gradient with the row; 0 for a dropped choice |
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Order) -> Tensor:
        needs_rows = ctx.needs_input_grad[1]
        ctx.save_for_backward(rows if needs_rows else None, weights, order.source, order.place)
        ctx.drops = order.drops
        return _rows(rows, order.place.shape[0])[1](_plain_rows(rows), order.place, weights, order.drops)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weights, source, place = ctx.saved_tensors
        run = _rows(grad, source.shape[0])
        grad_rows, grad_weights = run[2](
            _plain_rows(grad), rows, weights, source, place, ctx.drops, ctx.needs_input_grad[0]
        )
        return grad_rows, None if grad_weights is None else grad_weights.to(weights.dtype), None


class _Reorder(torch.autograd.Function):
    """x[index] for a permutation; backward with its inverse, which needs no sum over equal indices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _rows(x, index.shape[0])[3](_plain_rows(x), index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return _rows(grad, inverse.shape[0])[3](_plain_rows(grad), inverse), None, None


def permute(x: Tensor, order: Order) -> Tensor:
    """x [T, H] -> [R, H]: a copy of the token for each kept choice, sorted by expert."""
    return _Permute.apply(x, order)


def combine(rows: Tensor, weights: Tensor, order: Order) -> Tensor:
    """rows [R, H] sorted by expert, weights [T, k] (fp32) -> [T, H] of rows' dtype: each token's weighted sum; choices
    that were dropped add nothing."""
    return _Combine.apply(rows, weights, order)


def reorder(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """x [R, ..] -> x[index], for a permutation and its inverse, int64 [R]."""
    return _Reorder.apply(x, index, inverse)


# ---- products of each group with its own matrix


def _loop_forward(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[1])
    for expert, rows in groups.slices():
        torch.mm(x[rows], weight[expert].t(), out=out[rows])
        if bias is not None:
            out[rows] += bias[expert]
    return out


def _loop_input_grad(grad: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    out = grad.new_empty(grad.shape[0], weight.shape[2])
    for expert, rows in groups.slices():
        torch.mm(grad[rows], weight[expert], out=out[rows])
    return out


def _loop_weight_grad(grad: Tensor, x: Tensor, groups: Groups) -> Tensor:
    out = x.new_zeros(groups.counts.shape[0], grad.shape[1], x.shape[1])
    for expert, rows in groups.slices():
        torch.mm(grad[rows].t(), x[rows], out=out[expert])
    return out


def _loop_sum(x: Tensor, groups: Groups) -> Tensor:
    out = x.new_zeros(groups.counts.shape[0], x.shape[1])
    for expert, rows in groups.slices():
        torch.sum(x[rows], 0, out=out[expert])
    return out


def _mm_forward(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
    if not x.shape[0]:
        return x.new_empty(0, weight.shape[1])
    out = F.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=groups.ends)
    return out if bias is None else out.add_(bias.index_select(0, groups.expert_of_row))


def _mm_input_grad(grad: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    if not grad.shape[0]:
        return grad.new_empty(0, weight.shape[2])
    return F.grouped_mm(grad.contiguous(), weight, offs=groups.ends)


def _mm_weight_grad(grad: Tensor, x: Tensor, groups: Groups) -> Tensor:
    if not x.shape[0]:
        return x.new_zeros(groups.counts.shape[0], grad.shape[1], x.shape[1])
    return F.grouped_mm(grad.contiguous().t(), x.contiguous(), offs=groups.ends)


def _mm_sum(x: Tensor, groups: Groups) -> Tensor:
    """A product with rows of zeros and ones: no atomics, and the host need not know the sizes."""
    experts = torch.arange(groups.counts.shape[0], device=x.device)
    return (experts[:, None] == groups.expert_of_row).to(x.dtype) @ x


def _whole_words(dtype: torch.dtype, *widths: int) -> bool:
    """Grouped GEMM kernels read 16 bytes at a time: each row must be a multiple of that."""
    return all(width * dtype.itemsize % 16 == 0 for width in widths)


_REFERENCE = Body("reference", (_loop_forward, _loop_input_grad, _loop_weight_grad, _loop_sum))
_OP = add_op(
    "grouped_linear",
    [
        Body(
            "grouped_mm",
            (_mm_forward, _mm_input_grad, _mm_weight_grad, _mm_sum),
            ("cuda",),
            (torch.bfloat16,),
        ),
        _REFERENCE,
    ],
)


def _body(x: Tensor, *widths: int) -> Body:
    body = _OP.pick(x.device.type, x.dtype)
    return body if _whole_words(x.dtype, *widths) else _REFERENCE


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
    """x [R, in] sorted by expert, weight [E, out, in], bias [E, out] or None -> [R, out]; without autograd."""
    return _body(x, *weight.shape[1:]).run[0](x, weight, bias, groups)


def grouped_input_grad(grad: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """grad [R, out], weight [E, out, in] -> gradient of x [R, in]."""
    return _body(grad, *weight.shape[1:]).run[1](grad, weight, groups)


def grouped_weight_grad(grad: Tensor, x: Tensor, groups: Groups) -> Tensor:
    """grad [R, out], x [R, in] -> gradient of the weight [E, out, in]; zeros for an expert without rows."""
    return _body(x, grad.shape[1], x.shape[1]).run[2](grad, x, groups)


def grouped_sum(x: Tensor, groups: Groups) -> Tensor:
    """x [R, N] -> [E, N]: the sum of each expert's rows."""
    return _body(x).run[3](x, groups)
