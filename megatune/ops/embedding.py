"""Looking up rows of a table, with a gradient that is the same bit by bit every time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatune.ops.checks import accumulate_dtype, floating, same_device
from megatune.ops.registry import Body, add_op, cuda_body, define


def _lookup(ids: Tensor, weight: Tensor, cut: bool) -> Tensor:
    if not cut:
        return F.embedding(ids, weight)
    known = ids >= 0
    return F.embedding(ids.where(known, 0), weight).masked_fill_(~known[:, None], 0.0)


def _fake_lookup(ids: Tensor, weight: Tensor, cut: bool) -> Tensor:
    return weight.new_empty(ids.shape[0], weight.shape[1])


# An id that is of no row stops the device, but for -1 if `cut`: a row of zeros.
_ROWS = define("embedding_rows(Tensor ids, Tensor weight, bool cut) -> Tensor", _lookup, _fake_lookup)


def _cuda_lookup(ids: Tensor, weight: Tensor, cut: bool) -> Tensor:
    return _ROWS(ids.contiguous(), weight if weight.stride(-1) == 1 else weight.contiguous(), cut)


def _dense(grad: Tensor, ids: Tensor, rows: int) -> Tensor:
    """PyTorch's: on CUDA it sums in one order, without atomics, but up to 3072 tokens adds up groups of them in grad's
    dtype."""
    return torch.ops.aten.embedding_dense_backward(grad, ids, rows, -1, False)


def _in_table(grad: Tensor, ids: Tensor, rows: int) -> Tensor:
    """The same for ids of which some are not in the table (-1)."""
    # They go to one more row, which is skipped.
    ids = ids.where(ids >= 0, rows)
    return torch.ops.aten.embedding_dense_backward(grad, ids, rows + 1, rows, False)[:rows]


def _torch(grad: Tensor, ids: Tensor, rows: int, cut: bool) -> Tensor:
    return _in_table(grad, ids, rows) if cut else _dense(grad, ids, rows)


def _reference(grad: Tensor, ids: Tensor, rows: int, cut: bool) -> Tensor:
    """Sums in fp32, rounded once."""
    return _torch(grad.to(accumulate_dtype(grad.dtype)), ids, rows, cut).to(grad.dtype)


def _sums(grad: Tensor, ids: Tensor, order: Tensor, rows: int) -> Tensor:
    """`_reference` for sorted ids, int32 [T], of which ids[i] belongs to row order[i] of grad."""
    known = torch.where((ids >= 0) & (ids < rows), ids, -1).long()
    return _reference(grad, torch.empty_like(order).scatter_(0, order, known), rows, True).contiguous()


def _fake_sums(grad: Tensor, ids: Tensor, order: Tensor, rows: int) -> Tensor:
    return grad.new_empty(rows, grad.shape[1])


_SUMS = define(
    "embedding_backward(Tensor grad, Tensor ids, Tensor order, int rows) -> Tensor", _sums, _fake_sums
)


def _order(ids: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [T] -> what `_SUMS` takes: int32 [T], ascending, and int64 [T], which of them each was."""
    # Half as many bits are sorted in half the time; no table has 2^31 rows.
    ordered, order = torch.sort(ids.to(torch.int32), stable=True)
    return ordered, order


def _fake_order(ids: Tensor) -> tuple[Tensor, Tensor]:
    return ids.new_empty(ids.shape, dtype=torch.int32), ids.new_empty(ids.shape)


_ORDER = define("embedding_order(Tensor ids) -> (Tensor, Tensor)", _order, _fake_order)
# Ids that the CUDA kernel sorts in half the time; its work grows with their square.
MOST_ORDERED = 65536


def _sorted(grad: Tensor, ids: Tensor, rows: int, cut: bool) -> Tensor:
    ordered, order = (_ORDER if ids.shape[0] <= MOST_ORDERED else _order)(ids.contiguous())
    return _SUMS(grad if grad.stride(-1) == 1 else grad.contiguous(), ordered, order, rows)


_OP = add_op(
    "embedding",
    [
        cuda_body(_cuda_lookup, _sorted),
        Body("torch", (_lookup, _torch), ("cuda",)),
        Body("reference", (_lookup, _reference)),
    ],
)


class _Embedding(torch.autograd.Function):
    """ids int64 [T], weight [V, H] -> [T, H], zeros for ids of -1 (if `cut`). Saved: ids."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, cut: bool) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.cut = weight.shape[0], cut
        return _OP.pick(weight.device.type, weight.dtype).run[0](ids, weight, cut)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (ids,) = ctx.saved_tensors
        return None, _OP.pick(grad.device.type, grad.dtype).run[1](grad, ids, ctx.rows, ctx.cut), None


def embedding(index: Tensor, weight: Tensor, first: int = 0, total: int | None = None) -> Tensor:
    """Rows of a table: index int64 [T], weight [V, H] -> [T, H] of the weight's dtype.

    `total`: the weight is the part [first, first + V) of a table of `total` rows; an index in another part of it gives
    zeros, and no gradient. An index that is in no part is refused, by IndexError on a CPU and a device-side assertion
    on CUDA. The gradient is the same bit by bit each time with every body: none uses atomics. Body "cuda" makes all its
    sums in fp32 and rounds once, as the reference does; "torch" does so for more than 3072 tokens only.
    ValueError where shapes, dtypes or devices do not fit.
    """
    op = "embedding"
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(f"{op}: index {index.dtype} {tuple(index.shape)} must be int64 [T]")
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight {tuple(weight.shape)} must be [rows, H]")
    if first < 0 or first + weight.shape[0] > (weight.shape[0] if total is None else total):
        raise ValueError(
            f"{op}: rows [{first}, {first + weight.shape[0]}) must be among the table's {total}; give total"
        )
    floating(op, weight=weight)
    same_device(op, index, weight=weight)
    if total is None or total == weight.shape[0]:
        return _Embedding.apply(index, weight, False)
    here = index - first
    elsewhere = ((here < 0) | (here >= weight.shape[0])) & (index >= 0) & (index < total)
    # What is nowhere stays out of range: -1 is for what is elsewhere.
    here = here.where((here >= 0) | elsewhere, weight.shape[0])
    return _Embedding.apply(here.masked_fill(elsewhere, -1), weight, True)
