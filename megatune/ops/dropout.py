"""Dropout whose mask is a function of what it acts on: the same under every layout, and when computed again."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatune.ops.checks import floating, same_device
from megatune.ops.registry import Body, add_op, compiled_body, fuse

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


def _in_blocks(x: Tensor, rows: Tensor, columns: Tensor, threshold: int, scale: float) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    step = max(1, _BLOCK // max(1, x.shape[1]))
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        out[part] = _apply(x[part], rows[part], columns, threshold, scale)
    return out


_OP = add_op("keyed_dropout", [compiled_body(fuse(_apply)), Body("reference", (_in_blocks,))])


class _KeyedDropout(torch.autograd.Function):
    """The mask is computed again in backward; saved are the hashes of rows [T] and columns [C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, columns: Tensor, threshold: int, scale: float) -> Tensor:
        ctx.save_for_backward(rows, columns)
        ctx.options = threshold, scale
        return _OP.pick(x.device.type, x.dtype).run[0](x, rows, columns, threshold, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run = _OP.pick(grad.device.type, grad.dtype).run[0]
        return run(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


def keyed_dropout(x: Tensor, p: float, key: int, rows: Tensor | None = None, first_column: int = 0) -> Tensor:
    """x with each element 0 with probability `p`, else divided by 1 - p.

    x [T, C] -> [T, C]. Which ones depends on `key` (62 bits of it), the element's row in the whole stream (`rows`,
    int64 [T]; None: 0, 1, ..) and its column there (`first_column`, ..), and on nothing else. p in [0, 1).
    ValueError where shapes or devices do not fit.
    """
    if x.dim() != 2 or (rows is not None and rows.shape != x.shape[:1]):
        raise ValueError(f"keyed_dropout: x {tuple(x.shape)} must be [T, C], rows [T]")
    if not 0 <= p < 1:
        raise ValueError(f"keyed_dropout: p is {p}, must be in [0, 1)")
    floating("keyed_dropout", x=x)
    same_device("keyed_dropout", x, rows=rows)
    if p == 0:
        return x
    if rows is None:
        rows = torch.arange(x.shape[0], device=x.device)
    columns = torch.arange(first_column, first_column + x.shape[1], device=x.device)
    # The key is scrambled first: rows under similar keys must not be each other's permutation.
    low = _mix(key & _MASK)
    high = _mix((key >> 31 & _MASK) ^ low ^ _KEYS)
    rows = _mix(_mix((rows & _MASK) ^ low) ^ high)
    columns = _mix(columns ^ _COLUMNS)
    return _KeyedDropout.apply(x, rows, columns, round(p * 2**31), 1 / (1 - p))
