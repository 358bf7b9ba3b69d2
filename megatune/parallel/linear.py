"""Products of linear layers whose weights are cut over tensor parallel processes, forward and backward.

Between such layers each process has its slice of the tokens (sequence parallelism, arXiv:2205.05198). T tokens, n
processes.

| cut | x | product | output | communication: forward; backward |
| --- | --- | --- | --- | --- |
| column (outputs) | [T / n, in] | [T, in] @ [out / n, in]^T | [T, out / n] | gather x; gather x again, scatter-sum dx |
| row (inputs) | [T, in / n] | [T, in / n] @ [out, in / n]^T | [T / n, out] | scatter-sum; gather |
| replicated | [T / n, in] | [T / n, in] @ [out, in]^T | [T / n, out] | none; the weight's gradient is partial |

Communication in pieces (`overlap`): the rows of each process are multiplied as they arrive, or sent as soon as they are
multiplied, so that links and products work at the same time, forward and backward. With few rows a piece is not worth
its own product: then one collective moves all.

Weight gradients go through `deferred.defer`, so that a zero-bubble pipeline can put them off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatune import ops
from megatune.parallel import deferred
from megatune.parallel.collectives import arriving, gather_rows, scatter_sum, scatter_sum_rows, summed
from megatune.parallel.world import Axis

# What a layer multiplies with: a weight, or a frozen one in few bits.
Weight = Tensor | ops.FrozenWeight
# Rows of a process from which communication goes in pieces.
PIECE_ROWS = 512


@dataclass(frozen=True, eq=False)
class LowRank:
    """A change beside a weight: scale * scatter(b) a, with `a` [adapters * r, in here] and `b` [adapted rows here, r].

    `layout`: which of the rows that are here it changes. `dropped`: the layer's input after the adapter's dropout
    (None: the input itself).
    """

    a: Tensor
    b: Tensor
    layout: ops.LoraLayout
    scale: float
    dropped: Tensor | None = None


def product(x: Tensor, weight: Weight, bias: Tensor | None, change: LowRank | None, splits: bool) -> Tensor:
    """x [T, in] @ (weight [out, in] + change)^T + bias -> [T, out], nothing sent. `splits`: weight gradients may be
    put off."""
    defer = deferred.defer if splits else None
    if change is not None:
        c = change
        return ops.lora_linear(x, weight, bias, c.a, c.b, c.layout, c.scale, c.dropped, defer)
    if isinstance(weight, ops.FrozenWeight):
        return ops.quantised_linear(x, weight, bias)
    return _Split.apply(x, weight, bias) if splits else F.linear(x, weight, bias)


def column(
    x: Tensor, weight: Weight, bias: Tensor | None, change: LowRank | None, axis: Axis, overlap: bool
) -> Tensor:
    """x [T / n, in], weight [out / n, in] -> [T, out / n]. The change's low-rank activations are computed where the
    tokens are, so that they are sent in place of dropped inputs: both its gradients are sums over the tokens here.
    `overlap`: communication runs behind products."""
    if change is None:
        return _Column.apply(x, weight, bias, None, None, None, None, 1.0, axis, overlap)
    c = change
    return _Column.apply(x, weight, bias, c.a, c.b, c.dropped, c.layout, c.scale, axis, overlap)


def row(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    change: LowRank | None,
    axis: Axis,
    splits: bool,
    overlap: bool,
) -> Tensor:
    """x [T, in / n], weight [out, in / n] -> [T / n, out]. The bias is added after the sum; its gradient is a sum over
    the tokens here."""
    if overlap and x.shape[0] // axis.size >= PIECE_ROWS:
        if change is None:
            out = _Row.apply(x, weight, None, None, None, None, 1.0, axis)
        else:
            c = change
            out = _Row.apply(x, weight, c.a, c.b, c.dropped, c.layout, c.scale, axis)
    else:
        out = scatter_sum(product(x, weight, None, change, splits), axis)
    return out if bias is None else out + bias


class _Split(torch.autograd.Function):
    """F.linear whose weight gradient can be put off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.parameter = weight
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_x = grad @ weight if need_x else None
        grad_weight = deferred.defer(ctx.parameter, lambda: grad.t() @ x) if need_weight else None
        return grad_x, grad_weight, grad.sum(0) if need_bias else None


class _Column(torch.autograd.Function):
    """out = gather(x) @ weight^T + bias + scale * gather(low) @ block^T, with low = dropped @ a^T and block =
    scatter(b); without an adapter the first two terms.

    | tensor | shape | |
    | --- | --- | --- |
    | x, dropped | [T / n, in] | saved as far as a weight's gradient needs them; x is gathered again in backward |
    | low | [T, adapters * r] | saved gathered |
    | grad_low = scatter_sum(scale * grad @ block) | [T / n, adapters * r] | |
    | grad_x = scatter_sum(grad @ weight) (+ grad_low @ a if x is dropped) | [T / n, in] | |

    In backward x is gathered behind grad @ weight, and grad_x summed behind the weight's gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        x_dropped: Tensor | None,
        layout: ops.LoraLayout | None,
        scale: float,
        axis: Axis,
        overlap: bool,
    ) -> Tensor:
        dropped = x if x_dropped is None else x_dropped
        ctx.frozen, kept = ops.saved(weight)
        weight = ops.dense(weight, x.dtype)
        low = low_arrived = None
        if overlap and x.shape[0] >= PIECE_ROWS:
            tokens = axis.size * x.shape[0]
            out = x.new_empty(tokens, weight.shape[0])
            for process, rows in arriving(x, x.new_empty(tokens, x.shape[1]), axis):
                _product_to(_rows_of(out, process, axis), rows, weight, bias)
                if low is None and a is not None:
                    low, low_arrived = gather_rows(F.linear(dropped, a.to(x.dtype)), axis, async_op=True)
        else:
            whole, arrived = gather_rows(x, axis, async_op=overlap)
            if a is not None:
                low, low_arrived = gather_rows(F.linear(dropped, a.to(x.dtype)), axis, async_op=overlap)
            _wait(arrived)
            out = F.linear(whole, weight, bias)
        _wait(low_arrived)
        if a is not None:
            out.addmm_(low, layout.scatter(b.to(x.dtype)).t(), alpha=scale)
        need_weight, need_a = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        ctx.save_for_backward(x if need_weight else None, dropped if need_a else None, low, kept, a, b)
        ctx.parameters = kept, a, b
        ctx.layout, ctx.scale, ctx.axis, ctx.overlap = layout, scale, axis, overlap
        ctx.has_dropped = x_dropped is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, dropped, low, weight, a, b = ctx.saved_tensors
        axis, overlap = ctx.axis, ctx.overlap
        need_x, need_weight, need_bias, need_a, need_b, need_dropped = ctx.needs_input_grad[:6]
        whole = arrived = grad_low = low_summed = grad_x = summed = None
        if need_weight and not deferred.active():
            whole, arrived = gather_rows(x, axis, async_op=overlap)
        if a is not None and (need_a or need_dropped or need_x):
            part = ops.scaled_product(grad, ctx.layout.scatter(b.to(grad.dtype)), ctx.scale)
            grad_low, low_summed = scatter_sum_rows(part, axis, async_op=overlap)
        if need_x:
            grad_x, summed = scatter_sum_rows(
                grad @ ops.dense(ctx.frozen or weight, grad.dtype), axis, async_op=overlap
            )
        grad_b = grad_weight = grad_a = grad_dropped = None
        if need_b:
            grad_b = _grad_b(ctx, grad, low, b.dtype)
        if need_weight:
            grad_weight = _grad_weight(ctx, grad, x, whole, arrived)
        _wait(low_summed)
        if need_a:
            dtype = a.dtype
            grad_a = deferred.defer(ctx.parameters[1], lambda: (grad_low.t() @ dropped).to(dtype))
        _wait(summed)
        if need_dropped:
            grad_dropped = grad_low @ a.to(grad.dtype)
        elif grad_x is not None and a is not None and not ctx.has_dropped:
            grad_x.addmm_(grad_low, a.to(grad.dtype))
        grad_bias = grad.sum(0) if need_bias else None
        return grad_x, grad_weight, grad_bias, grad_a, grad_b, grad_dropped, None, None, None, None


def _grad_weight(
    ctx: Any, grad: Tensor, x: Tensor, whole: Tensor | None, arrived: dist.Work | None
) -> Tensor | None:
    axis = ctx.axis

    def compute() -> Tensor:
        _wait(arrived)
        # Put off, the whole input is gathered when its time has come: until then only this process's part is kept.
        rows = gather_rows(x, axis)[0] if whole is None else whole
        return grad.t() @ rows

    return deferred.defer(ctx.parameters[0], compute)


def _grad_b(ctx: Any, grad: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor | None:
    layout, scale = ctx.layout, ctx.scale

    def compute() -> Tensor:
        return layout.gather(ops.block_grad(grad, low, scale)).to(dtype)

    return deferred.defer(ctx.parameters[2], compute)


class _Row(torch.autograd.Function):
    """out = sum over the processes of (x @ weight^T + scale * low @ block^T), with low = dropped @ a^T and block as
    in `_Column`; without an adapter the first term. In pieces: forward each part is sent behind the product of the
    next, backward grad_x is computed of each part as it arrives.

    | tensor | shape | |
    | --- | --- | --- |
    | x, dropped | [T, in / n] | |
    | low | [T, adapters * r] | a partial sum, saved |
    | grad | [T / n, out] | gathered in backward |
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        a: Tensor | None,
        b: Tensor | None,
        x_dropped: Tensor | None,
        layout: ops.LoraLayout | None,
        scale: float,
        axis: Axis,
    ) -> Tensor:
        dropped = x if x_dropped is None else x_dropped
        ctx.frozen, kept = ops.saved(weight)
        weight = ops.dense(weight, x.dtype)
        low = block = None
        if a is not None:
            low, block = F.linear(dropped, a.to(x.dtype)), layout.scatter(b.to(x.dtype))

        def produce(process: int, out: Tensor) -> None:
            _product_to(out, _rows_of(x, process, axis), weight, None)
            if a is not None:
                out.addmm_(_rows_of(low, process, axis), block.t(), alpha=scale)

        need_weight, need_a = ctx.needs_input_grad[1:3]
        ctx.save_for_backward(x if need_weight else None, dropped if need_a else None, low, kept, a, b)
        ctx.parameters = kept, a, b
        ctx.layout, ctx.scale, ctx.axis = layout, scale, axis
        ctx.has_dropped = x_dropped is not None
        return summed(produce, x.new_empty(x.shape[0] // axis.size, weight.shape[0]), axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, dropped, low, weight, a, b = ctx.saved_tensors
        axis, weight = ctx.axis, ops.dense(ctx.frozen or weight, grad.dtype)
        need_x, need_weight, need_a, need_b, need_dropped = ctx.needs_input_grad[:5]
        tokens = axis.size * grad.shape[0]
        whole = grad.new_empty(tokens, grad.shape[1])
        grad_x = grad.new_empty(tokens, weight.shape[1]) if need_x else None
        for process, rows in arriving(grad, whole, axis):
            if need_x:
                torch.mm(rows, weight, out=_rows_of(grad_x, process, axis))
        grad_low = grad_dropped = grad_weight = grad_a = grad_b = None
        if a is not None and (need_a or need_dropped or (need_x and not ctx.has_dropped)):
            grad_low = ops.scaled_product(whole, ctx.layout.scatter(b.to(grad.dtype)), ctx.scale)
            if need_dropped:
                grad_dropped = grad_low @ a.to(grad.dtype)
            elif need_x and not ctx.has_dropped:
                grad_x.addmm_(grad_low, a.to(grad.dtype))
        if need_a:
            dtype = a.dtype
            grad_a = deferred.defer(ctx.parameters[1], lambda: (grad_low.t() @ dropped).to(dtype))
        if need_b:
            grad_b = _grad_b(ctx, whole, low, b.dtype)
        if need_weight:
            grad_weight = deferred.defer(ctx.parameters[0], lambda: whole.t() @ x)
        return grad_x, grad_weight, grad_a, grad_b, grad_dropped, None, None, None


def _rows_of(x: Tensor, process: int, axis: Axis) -> Tensor:
    rows = x.shape[0] // axis.size
    return x.narrow(0, process * rows, rows)


def _product_to(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """out becomes x @ weight^T + bias."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _wait(work: dist.Work | None) -> None:
    if work is not None:
        work.wait()
