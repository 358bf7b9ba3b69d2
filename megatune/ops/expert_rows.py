"""Rows of tokens to their experts and back: the bodies of "expert_rows", which megatune.ops.moe calls.

Legend as there: T tokens, k choices of each, R rows = kept choices; `source` int64 [R] is the assignment (token * k +
choice) that stands in each row, `place` int64 [T, k] the row of each assignment, R for one that was dropped. Nothing
uses atomics.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatune.ops.checks import accumulate_dtype
from megatune.ops.registry import Body, add_op, compiled_body, cuda_body, define, fuse


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index)


def _with_zero_row(rows: Tensor, drops: bool) -> Tensor:
    """What `Order.place` of a dropped choice points to."""
    return torch.cat((rows, rows.new_zeros(1, rows.shape[1]))) if drops else rows


def _sum_choices(rows: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    """[R, H], int64 [T, k] -> [T, H]: the sum of each token's rows, times `weights` [T, k] if any; in fp32."""
    total = rows.new_zeros(place.shape[0], rows.shape[1], dtype=accumulate_dtype(rows.dtype))
    for choice in range(place.shape[1]):
        part = rows.index_select(0, place[:, choice])
        total += part if weights is None else part * weights[:, choice, None]
    return total.to(rows.dtype)


def _spread(grad: Tensor, token: Tensor, weight: Tensor) -> Tensor:
    """grad[token] * weight[:, None], the product in fp32: [T, H], int64 [R], [R] -> [R, H]."""
    # In place: rounded once, without the product in fp32.
    return grad.index_select(0, token).mul_(weight[:, None])


def _products(rows: Tensor, place: Tensor, grad: Tensor) -> Tensor:
    """[R, H], int64 [T, k], [T, H] -> [T, k]: the product of each token's rows with its gradient; in fp32."""
    wide = grad.to(accumulate_dtype(grad.dtype))
    return torch.stack([(rows.index_select(0, index) * wide).sum(1) for index in place.unbind(1)], 1)


# The same for fusing, without passing through memory.


def _spread_at_once(grad: Tensor, token: Tensor, weight: Tensor) -> Tensor:
    return (grad[token] * weight[:, None]).to(grad.dtype)


def _products_at_once(rows: Tensor, place: Tensor, grad: Tensor) -> Tensor:
    return (rows[place].to(accumulate_dtype(rows.dtype)) * grad[:, None]).sum(2)


def _of_parts(
    take: Callable, sum_choices: Callable, spread: Callable, products: Callable
) -> tuple[Callable, ...]:
    """The functions of a body of "expert_rows" from those of one step each."""

    def copies(x: Tensor, source: Tensor, place: Tensor) -> Tensor:
        return take(x, source // place.shape[1])

    def add_up(rows: Tensor, place: Tensor, weights: Tensor | None, drops: bool) -> Tensor:
        return sum_choices(_with_zero_row(rows, drops), place, weights)

    def backward(
        grad: Tensor,
        rows: Tensor | None,
        weights: Tensor,
        source: Tensor,
        place: Tensor,
        drops: bool,
        rows_grad: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        grad_rows = grad_weights = None
        if rows_grad:
            grad_rows = spread(grad, source // place.shape[1], weights.flatten().index_select(0, source))
        if rows is not None:
            grad_weights = products(_with_zero_row(rows, drops), place, grad)
        return grad_rows, grad_weights

    return copies, add_up, backward, take


def _fake_take(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty(index.shape[0], x.shape[1])


def _inside(index: Tensor, rows: int) -> Tensor:
    """Indices outside of [0, rows) as `rows`."""
    return torch.where((index >= 0) & (index < rows), index, rows)


def _take_inside(x: Tensor, index: Tensor) -> Tensor:
    return _take(_with_zero_row(x, True), _inside(index, x.shape[0]))


def _sum_inside(rows: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    return _sum_choices(_with_zero_row(rows, True), _inside(place, rows.shape[0]), weights)


def _fake_sum(rows: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    return rows.new_empty(place.shape[0], rows.shape[1])


def _copies(x: Tensor, place: Tensor, rows: int) -> Tensor:
    index = _inside(place, rows).flatten()
    return x.new_zeros(rows + 1, x.shape[1]).index_copy_(0, index, x.repeat_interleave(place.shape[1], 0))[
        :rows
    ]


def _fake_copies(x: Tensor, place: Tensor, rows: int) -> Tensor:
    return x.new_empty(rows, x.shape[1])


def _sum_backward(
    grad: Tensor, rows: Tensor | None, weights: Tensor, place: Tensor, count: int, rows_grad: bool
) -> tuple[Tensor, Tensor]:
    """Token by token: its gradient is read once for all its rows."""
    place = _inside(place, count)
    grad_rows, grad_weights = grad.new_empty(0, grad.shape[1]), weights.new_empty(0, weights.shape[1])
    if rows_grad:
        wide = grad.to(accumulate_dtype(grad.dtype))[:, None] * weights[:, :, None]
        index = place.flatten()
        grad_rows = grad.new_zeros(count + 1, grad.shape[1])
        grad_rows = grad_rows.index_copy_(0, index, wide.flatten(0, 1).to(grad.dtype))[:count]
    if rows is not None:
        grad_weights = _products(_with_zero_row(rows, True), place, grad).to(weights.dtype)
    return grad_rows, grad_weights


def _fake_sum_backward(
    grad: Tensor, rows: Tensor | None, weights: Tensor, place: Tensor, count: int, rows_grad: bool
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(count if rows_grad else 0, grad.shape[1]), weights.new_empty(
        weights.shape if rows is not None else (0, weights.shape[1])
    )


# Kernels of csrc/cuda. An index outside of the rows stands for a row of zeros. Where rows are written by their places
# each of them must be the place of one assignment: the others are left as they are.
_TAKE = define("expert_take(Tensor x, Tensor index) -> Tensor", _take_inside, _fake_take)
_COPIES = define("expert_copies(Tensor x, Tensor place, int rows) -> Tensor", _copies, _fake_copies)
_SUM = define("expert_sum(Tensor rows, Tensor place, Tensor? weights) -> Tensor", _sum_inside, _fake_sum)
_SUM_BACKWARD = define(
    "expert_sum_backward(Tensor grad, Tensor? rows, Tensor weights, Tensor place, int count, bool rows_grad) "
    "-> (Tensor, Tensor)",
    _sum_backward,
    _fake_sum_backward,
)


def _cuda_copies(x: Tensor, source: Tensor, place: Tensor) -> Tensor:
    # By token, not by row: each is read once, and not once for each of its experts from beyond the cache.
    return _COPIES(x, place, source.shape[0])


def _cuda_sum(rows: Tensor, place: Tensor, weights: Tensor | None, drops: bool) -> Tensor:
    return _SUM(rows, place, None if weights is None else weights.float().contiguous())


def _cuda_backward(
    grad: Tensor,
    rows: Tensor | None,
    weights: Tensor,
    source: Tensor,
    place: Tensor,
    drops: bool,
    rows_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:
    wide = weights.float().contiguous()
    grad_rows, grad_weights = _SUM_BACKWARD(grad, rows, wide, place, source.shape[0], rows_grad)
    return grad_rows if rows_grad else None, None if rows is None else grad_weights


# (x [T, H], source, place) -> rows [R, H]; (rows, place, weights [T, k] or None, whether some are dropped) -> [T, H];
# (grad [T, H], rows or None where the weights need no gradient, weights, source, place, whether some are dropped,
# whether the rows need theirs) -> both gradients; (x [R, H], index [N]) -> [N, H].
ROWS = add_op(
    "expert_rows",
    [
        cuda_body(_cuda_copies, _cuda_sum, _cuda_backward, _TAKE),
        compiled_body(
            *_of_parts(
                fuse(lambda x, index: x[index]),
                fuse(_sum_choices),
                fuse(_spread_at_once),
                fuse(_products_at_once),
            )
        ),
        Body("reference", _of_parts(_take, _sum_choices, _spread, _products)),
    ],
)
