"""A linear layer with a low-rank adapter (LoRA, arXiv:2106.09685), also on fused weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatune.ops.checks import floating, same_device
from megatune.ops.quant import FrozenWeight, dense, saved

# Given a parameter and what computes its gradient: the gradient, or None where it comes later.
Defer = Callable[[Tensor, Callable[[], Tensor]], Tensor | None]


@dataclass(frozen=True)
class LoraLayout:
    """Which rows of a (fused) weight the adapter changes.

    The rows are `groups` equal groups; in a group `parts` follow one after the other: (rows in one group, index of
    that part's adapter, or None where the part has none). Adapters are numbered 0, 1, .. in the order of the parts.
    A weight that is not fused is one group with one part: `LoraLayout.whole(rows)`.
    """

    parts: tuple[tuple[int, int | None], ...]
    groups: int = 1

    @classmethod
    def whole(cls, rows: int) -> LoraLayout:
        return cls(((rows, 0),))

    @classmethod
    def of(cls, parts: Iterable[tuple[str, int]], groups: int, targets: Iterable[str]) -> LoraLayout:
        """From `Fused.parts` and `Fused.groups`, with adapters on the parts named in `targets`."""
        parts, targets = tuple(parts), set(targets)
        unknown = targets - {name for name, _ in parts}
        if unknown or not targets:
            raise ValueError(
                f"LoraLayout: targets {sorted(targets)} must be some of {[name for name, _ in parts]}"
            )
        chosen, numbered = 0, []
        for name, rows in parts:
            numbered.append((rows, chosen if name in targets else None))
            chosen += name in targets
        return cls(tuple(numbered), groups)

    @property
    def adapters(self) -> int:
        """Number of parts with an adapter; lora_a is [adapters * r, in]."""
        return sum(index is not None for _, index in self.parts)

    @property
    def rows(self) -> int:
        """Rows of the weight."""
        return self.groups * sum(rows for rows, _ in self.parts)

    @property
    def adapted_rows(self) -> int:
        """Rows of the parts with an adapter; lora_b is [adapted_rows, r]."""
        return self.groups * sum(rows for rows, index in self.parts if index is not None)

    def scatter(self, b: Tensor) -> Tensor:
        """b [adapted_rows, r] -> block matrix [rows, adapters * r]; its product with lora_a is the weight's change."""
        if len(self.parts) == 1:
            return b
        rank = b.shape[1]
        compact = b.view(self.groups, -1, rank)
        block = b.new_zeros(self.groups, self.rows // self.groups, self.adapters, rank)
        for row, source, rows, index in self._slices():
            block[:, row : row + rows, index] = compact[:, source : source + rows]
        return block.view(self.rows, -1)

    def gather(self, block: Tensor) -> Tensor:
        """The reverse of `scatter`: [rows, adapters * r] -> [adapted_rows, r]; the rest is dropped."""
        if len(self.parts) == 1:
            return block
        rank = block.shape[1] // self.adapters
        wide = block.view(self.groups, -1, self.adapters, rank)
        pieces = [wide[:, row : row + rows, index] for row, _, rows, index in self._slices()]
        return torch.cat(pieces, 1).reshape(self.adapted_rows, rank)

    def _slices(self) -> list[tuple[int, int, int, int]]:
        """(first row in a group, first row in a group of b, rows, adapter) of each part with an adapter."""
        slices, row, source = [], 0, 0
        for rows, index in self.parts:
            if index is not None:
                slices.append((row, source, rows, index))
                source += rows
            row += rows
        return slices


class _LoraLinear(torch.autograd.Function):
    """out = x @ weight^T + bias + scale * dropped @ a^T @ block^T, with block = scatter(b) [out, adapters * r]. The
    products multiply by `scale` before they round.

    | tensor | shape | |
    | --- | --- | --- |
    | x, dropped | [T, in] | dropped is x itself where there is no dropout |
    | low = dropped @ a^T | [T, adapters * r] | saved |
    | grad_low = scale * grad @ block | [T, adapters * r] | |
    | grad_x = grad @ weight (+ grad_low @ a if x is dropped) | [T, in] | one buffer |
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | FrozenWeight,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        x_dropped: Tensor | None,
        layout: LoraLayout,
        scale: float,
        defer: Defer | None,
    ) -> Tensor:
        dropped = x if x_dropped is None else x_dropped
        low = F.linear(dropped, a.to(x.dtype))
        out = F.linear(x, dense(weight, x.dtype), bias)
        block = layout.scatter(b.to(x.dtype))
        if torch.compiler.is_compiling():
            # torch 2.11 traces an output changed in place as one without a gradient: all gradients came out zero.
            out = torch.addmm(out, low, block.t(), alpha=scale)
        else:
            out.addmm_(low, block.t(), alpha=scale)
        # x itself is needed only for the gradient of a weight that is trained beside its adapter.
        ctx.frozen, weight_or_none = saved(weight)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, dropped, low, weight_or_none, a, b)
        ctx.layout, ctx.scale, ctx.has_dropped, ctx.defer = layout, scale, x_dropped is not None, defer
        if defer is not None:
            ctx.parameters = weight, a, b
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, dropped, low, weight, a, b = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b, need_dropped = ctx.needs_input_grad[:6]
        layout, scale = ctx.layout, ctx.scale
        grad_x = grad_low = grad_dropped = grad_a = grad_b = grad_weight = None
        if need_x:
            grad_x = grad @ dense(ctx.frozen or weight, grad.dtype)
        if need_a or need_dropped or (need_x and not ctx.has_dropped):
            grad_low = scaled_product(grad, layout.scatter(b.to(grad.dtype)), scale)
            if need_dropped:
                grad_dropped = grad_low @ a.to(grad.dtype)
            elif need_x and not ctx.has_dropped:
                grad_x.addmm_(grad_low, a.to(grad.dtype))
        if need_a:
            grad_a = _now_or_later(ctx, 1, lambda: (grad_low.t() @ dropped).to(a.dtype))
        if need_b:
            grad_b = _now_or_later(ctx, 2, lambda: layout.gather(block_grad(grad, low, scale)).to(b.dtype))
        if need_weight:
            grad_weight = _now_or_later(ctx, 0, lambda: grad.t() @ x)
        grad_bias = grad.sum(0) if need_bias else None
        return grad_x, grad_weight, grad_bias, grad_a, grad_b, grad_dropped, None, None, None


def scaled_product(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """scale * x @ y [n, k] [k, m], rounded once. (The factor rounded into a matrix, where it is no power of two, would
    be a second rounding.)"""
    # A product that torch.compile makes itself reads what it multiplies by 0.
    nothing = x.new_zeros(1, 1) if torch.compiler.is_compiling() else x.new_empty(1, 1)
    return torch.addmm(nothing, x, y, beta=0, alpha=scale)


def block_grad(grad: Tensor, low: Tensor, scale: float) -> Tensor:
    """scale * grad^T @ low [out, adapters * r]. Of 16 bits as the transpose of low^T @ grad, which is faster; in fp32
    cuBLAS adds that up in an order with more error than PyTorch's own gradient has (tests/ops/test_numerics.py)."""
    if grad.dtype.itemsize > 2:
        return scaled_product(grad.t(), low, scale)
    return scaled_product(low.t(), grad, scale).t()


def _now_or_later(ctx: Any, which: int, compute: Callable[[], Tensor]) -> Tensor | None:
    return compute() if ctx.defer is None else ctx.defer(ctx.parameters[which], compute)


def lora_linear(
    x: Tensor,
    weight: Tensor | FrozenWeight,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    layout: LoraLayout,
    scale: float,
    x_dropped: Tensor | None = None,
    defer: Defer | None = None,
) -> Tensor:
    """x @ weight^T + bias + scale * x_dropped @ a^T @ scatter(b)^T.

    x [T, in], weight [out, in] (in few bits it has no gradient), bias [out] or None, a [adapters * r, in],
    b [adapted_rows, r] -> [T, out] of x's dtype. `x_dropped` [T, in]: x after the adapter's dropout, where there is one
    (None: x itself). a and b may be fp32 beside a bf16 x; products are in x's dtype, the gradients of a and b are
    rounded to it before the cast back.
    `defer`: given weight, a or b and a function that computes its gradient, it returns the gradient, or None and calls
    the function later. ValueError where shapes, dtypes or devices do not fit.
    """
    op = "lora_linear"
    frozen = isinstance(weight, FrozenWeight)
    if x.dim() != 2 or weight.shape != (layout.rows, x.shape[1]) or not (frozen or weight.dtype == x.dtype):
        raise ValueError(
            f"{op}: x {x.dtype} {tuple(x.shape)} must be [T, in] and weight {weight.dtype} {tuple(weight.shape)} "
            f"[{layout.rows}, in] of the same dtype"
        )
    if a.dim() != 2 or a.shape[0] % layout.adapters or a.shape[1] != x.shape[1]:
        raise ValueError(f"{op}: a {tuple(a.shape)} must be [{layout.adapters} * rank, {x.shape[1]}]")
    if b.shape != (layout.adapted_rows, a.shape[0] // layout.adapters):
        raise ValueError(
            f"{op}: b {tuple(b.shape)} must be [{layout.adapted_rows}, {a.shape[0] // layout.adapters}]"
        )
    if x_dropped is not None and (x_dropped.shape != x.shape or x_dropped.dtype != x.dtype):
        raise ValueError(f"{op}: x_dropped {tuple(x_dropped.shape)} must be like x {tuple(x.shape)}")
    floating(op, a=a, b=b)
    same_device(op, x, weight=weight, bias=bias, a=a, b=b, x_dropped=x_dropped)
    return _LoraLinear.apply(x, weight, bias, a, b, x_dropped, layout, scale, defer)
