"""Looking up rows of a table, with a gradient that is the same bit by bit every time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatune.ops.checks import accumulate_dtype, floating, same_device
from megatune.ops.registry import Body, add_op, cuda_body, define


def _local(ids: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """(rows of the part [first, first + rows) of a table, which of them there are)."""
    here = ids - first
    return here, (here >= 0) & (here < rows)


def _lookup(ids: Tensor, weight: Tensor, first: int, total: int) -> Tensor:
    if total == weight.shape[0]:
        return F.embedding(ids, weight)
    here, known = _local(ids, first, weight.shape[0])
    # What is in no part is of no row, and refused.
    here = here.where(known, 0).masked_fill((ids < 0) | (ids >= total), weight.shape[0])
    return F.embedding(here, weight).masked_fill_(~known[:, None], 0.0)


def _fake_lookup(ids: Tensor, weight: Tensor, first: int, total: int) -> Tensor:
    return weight.new_empty(ids.shape[0], weight.shape[1])


# The weight is the part of a table of `total` rows that begins at `first`; ids of other parts: rows of zeros. An id
# that is in no part stops the device.
_ROWS = define(
    "embedding_rows(Tensor ids, Tensor weight, int first, int total) -> Tensor", _lookup, _fake_lookup
)


def _cuda_lookup(ids: Tensor, weight: Tensor, first: int, total: int) -> Tensor:
    return _ROWS(ids.contiguous(), weight if weight.stride(-1) == 1 else weight.contiguous(), first, total)


def _torch(grad: Tensor, ids: Tensor, first: int, rows: int, cut: bool) -> Tensor:
    """PyTorch's: on CUDA it sums in one order, without atomics, but up to 3072 tokens adds up groups of them in grad's
    dtype."""
    if not cut:
        return torch.ops.aten.embedding_dense_backward(grad, ids, rows, -1, False)
    # Ids of other parts go to one more row, which is skipped.
    here, known = _local(ids, first, rows)
    here = here.where(known, rows)
    return torch.ops.aten.embedding_dense_backward(grad, here, rows + 1, rows, False)[:rows]


def _reference(grad: Tensor, ids: Tensor, first: int, rows: int, cut: bool) -> Tensor:
    """Sums in fp32, rounded once."""
    return _torch(grad.to(accumulate_dtype(grad.dtype)), ids, first, rows, cut).to(grad.dtype)


def _sums(grad: Tensor, ids: Tensor, order: Tensor | None, first: int, rows: int) -> Tensor:
    return _reference(grad, ids, first, rows, True).contiguous()


def _fake_sums(grad: Tensor, ids: Tensor, order: Tensor | None, first: int, rows: int) -> Tensor:
    return grad.new_empty(rows, grad.shape[1])


# `order`, int64 [T], sorts the ids by row, equal ones as they come, those in no row last; None: the op finds it.
_SUMS = define(
    "embedding_backward(Tensor grad, Tensor ids, Tensor? order, int first, int rows) -> Tensor",
    _sums,
    _fake_sums,
)
# Ids that the CUDA kernel sorts by itself, beside other work; what it does for that grows with their square.
MOST_ORDERED = 65536


def _order(ids: Tensor, first: int, rows: int) -> Tensor:
    here, known = _local(ids, first, rows)
    # Half as many bits are sorted in half the time; no table has 2^31 rows.
    return torch.sort(here.where(known, rows).to(torch.int32), stable=True)[1]


def _sorted(grad: Tensor, ids: Tensor, first: int, rows: int, cut: bool) -> Tensor:
    order = _order(ids, first, rows) if ids.shape[0] > MOST_ORDERED else None
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    return _SUMS(grad, ids.contiguous(), order, first, rows)


_OP = add_op(
    "embedding",
    [
        cuda_body(_cuda_lookup, _sorted),
        Body("torch", (_lookup, _torch), ("cuda",)),
        Body("reference", (_lookup, _reference)),
    ],
)


class _Embedding(torch.autograd.Function):
    """ids int64 [T], weight [V, H], rows [first, first + V) of `total` -> [T, H]. Saved: ids."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, first: int, total: int) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.part = first, weight.shape[0], total > weight.shape[0]
        return _OP.pick(weight.device.type, weight.dtype).run[0](ids, weight, first, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        return None, _OP.pick(grad.device.type, grad.dtype).run[1](grad, ids, *ctx.part), None, None


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
    whole = weight.shape[0] if total is None else total
    if first < 0 or first + weight.shape[0] > whole:
        raise ValueError(
            f"{op}: rows [{first}, {first + weight.shape[0]}) must be among the table's {total}; give total"
        )
    floating(op, weight=weight)
    same_device(op, index, weight=weight)
    return _Embedding.apply(index, weight, first, whole)
