"""Dropout whose mask is a function of what it acts on: the same under every layout, and when computed again."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatune.ops.checks import floating, same_device
from megatune.ops.registry import Body, add_op, compiled_body, cuda_body, define, fuse

_Number = TypeVar("_Number", Tensor, int)

# Numbers of 31 bits: the product of two fits into int64, so that nothing overflows on any device.
_MASK = 2**31 - 1
# Two constants that keep the hashes of rows, columns and keys apart.
_COLUMNS, _KEYS = 0x3C6EF372, 0x1B873593
# Elements of the mask that exist at a time, 8 bytes each and several of them, unless they are fused away.
_BLOCK = 2**20


def _mix(x: _Number) -> _Number:
    """A bijection of 31-bit numbers that scrambles them (xor-shift and multiply, as MurmurHash3 ends)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x046CA68B) & _MASK
    return x ^ (x >> 16)


def _apply(x: Tensor, rows: Tensor, columns: Tensor, threshold: int, scale: float) -> Tensor:
    """x [T, C] * scale where the hash of (row, column) is at least the threshold, else 0."""
    keep = _mix(rows[:, None] ^ columns[None, :]) >= threshold
    return torch.where(keep, x * scale, 0.0).to(x.dtype)


def _hashes(x: Tensor, rows: Tensor | None, low: int, high: int, first_column: int) -> tuple[Tensor, Tensor]:
    """Of the rows [T] and the columns [C] of x; `low`, `high`: the scrambled key."""
    if rows is None:
        rows = torch.arange(x.shape[0], device=x.device)
    columns = torch.arange(first_column, first_column + x.shape[1], device=x.device)
    return _mix(_mix((rows & _MASK) ^ low) ^ high), _mix(columns ^ _COLUMNS)


def _reference(
    x: Tensor, rows: Tensor | None, low: int, high: int, first_column: int, threshold: int, scale: float
) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    hashes, columns = _hashes(x, rows, low, high, first_column)
    step = max(1, _BLOCK // max(1, x.shape[1]))
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        out[part] = _apply(x[part], hashes[part], columns, threshold, scale)
    return out


_FUSED = fuse(_apply)


def _compiled(
    x: Tensor, rows: Tensor | None, low: int, high: int, first_column: int, threshold: int, scale: float
) -> Tensor:
    return _FUSED(x, *_hashes(x, rows, low, high, first_column), threshold, scale)


def _fake(x: Tensor, rows: Tensor | None, *how: Any) -> Tensor:
    return x.new_empty(x.shape)


_DROPOUT = define(
    "keyed_dropout(Tensor x, Tensor? rows, int low, int high, int first_column, int threshold, float scale) "
    "-> Tensor",
    _reference,
    _fake,
)


def _cuda(x: Tensor, rows: Tensor | None, *how: Any) -> Tensor:
    return _DROPOUT(
        x if x.stride(1) == 1 else x.contiguous(), None if rows is None else rows.contiguous(), *how
    )


_OP = add_op("keyed_dropout", [cuda_body(_cuda), compiled_body(_compiled), Body("reference", (_reference,))])


class _KeyedDropout(torch.autograd.Function):
    """`how`: as of `_reference` from `low` on. Saved: rows; the mask is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor | None, *how: Any) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.how = how
        return _OP.pick(x.device.type, x.dtype).run[0](x, rows, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        run = _OP.pick(grad.device.type, grad.dtype).run[0]
        return run(grad, rows, *ctx.how), *(None,) * 6


def keyed_dropout(x: Tensor, p: float, key: int, rows: Tensor | None = None, first_column: int = 0) -> Tensor:
    """x with each element 0 with probability `p`, else divided by 1 - p.

    x [T, C] -> [T, C]. Which ones depends on `key` (62 bits of it), the element's row in the whole stream (`rows`,
    int64 [T]; None: 0, 1, ..) and its column there (`first_column`, ..), and on nothing else. p in [0, 1).
    ValueError where shapes or devices do not fit.
    """
    if x.dim() != 2 or (rows is not None and rows.shape != x.shape[:1]):
        raise ValueError(f"keyed_dropout: x {tuple(x.shape)} must be [T, C], rows [T]")
    if rows is not None and rows.dtype != torch.int64:
        raise ValueError(f"keyed_dropout: rows must be int64, got {rows.dtype}")
    if not 0 <= p < 1:
        raise ValueError(f"keyed_dropout: p is {p}, must be in [0, 1)")
    floating("keyed_dropout", x=x)
    same_device("keyed_dropout", x, rows=rows)
    if p == 0:
        return x
    # The key is scrambled first: rows under similar keys must not be each other's permutation.
    low = _mix(key & _MASK)
    high = _mix((key >> 31 & _MASK) ^ low ^ _KEYS)
    return _KeyedDropout.apply(x, rows, low, high, first_column, round(p * 2**31), 1 / (1 - p))
