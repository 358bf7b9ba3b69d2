"""Expert parallelism: linear layers of several experts, and the way of the tokens to them and back.

The processes of dp_shard x cp x tp are seen as efsdp x ep x etp. Process r of an `ep` line holds experts [r * E / ep,
(r + 1) * E / ep); processes of an `etp` line, neighbours in a tensor parallel line, share the inner size of theirs.

| step | rows | over |
| --- | --- | --- |
| each process's own tokens (a slice of a micro-batch) | T | |
| gather tokens and choices | etp * T | etp |
| sort the choices by expert | etp * T * k | |
| send each to the process that has its expert | as the router likes | ep |
| sort by expert, compute, and all of it backwards | | ep |
| weighted sum of each token's choices, a partial sum where etp > 1 | etp * T | |
| sum, each process gets its own tokens' | T | etp |

Every choice is computed on one process of its ep line (on its slice of the inner size), so an expert's gradient is a
sum over efsdp with every token in it once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatune import ops
from megatune.ops import moe
from megatune.ops.moe import Groups
from megatune.parallel import deferred
from megatune.parallel.collectives import all_to_all, exchange_rows, gather, gather_rows, scatter_sum
from megatune.parallel.shard import Fused, ShardSpec, local_shape
from megatune.parallel.world import Axis, World


@dataclass(frozen=True, eq=False)
class GroupedLowRank:
    """A change beside each expert's weight: scale * scatter(b[e]) a[e]. `a` [E here, adapters * r, in here], `b` [E
    here, adapted rows here, r]; `layout`: which rows of one expert's weight it changes. `dropped`: the layer's input
    after the adapter's dropout (None: the input itself)."""

    a: Tensor
    b: Tensor
    layout: ops.LoraLayout
    scale: float
    dropped: Tensor | None = None

    @property
    def stacked(self) -> ops.LoraLayout:
        """The layout of all experts' rows, one expert after the other."""
        return ops.LoraLayout(self.layout.parts, self.layout.groups * self.a.shape[0])


class GroupedLinear(nn.Module):
    """y = x W[e]^T + b[e] for rows sorted by expert e; sizes of the whole layer.

    `weight` [experts, out, in], `bias` [experts, out] or None; of them this process holds its experts. `shard`: which
    way expert tensor parallelism cuts each expert, "column" its outputs or "row" its inputs; of a row-cut layer every
    process computes a partial sum, and the first adds the bias. `fused`: order of an expert's rows where the weight
    joins several matrices; `local_fused`: of those that are here. `adapter`: None, or a module called as `adapter(x,
    self, groups)` in place of the plain product, which adds its change by `self.product`.
    """

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        shard: Literal["column", "row"],
        fused: Fused | None = None,
        world: World | None = None,
    ) -> None:
        super().__init__()
        world = world or World.alone()
        self.experts, self.in_features, self.out_features = experts, in_features, out_features
        self.shard: Literal["column", "row"] = shard
        self.axis, self.cut = world.etp, world.cut
        self.fused = fused
        self.local_fused = None if fused is None else fused.slice(self.axis.rank, self.axis.size)[0]
        self.adds_bias = shard == "column" or self.axis.is_first
        is_column = shard == "column"
        shapes = {
            "weight": ShardSpec("", (experts, out_features, in_features), 1 if is_column else 2, expert=True),
            "bias": ShardSpec("", (experts, out_features), 1 if is_column else None, expert=True),
        }
        empty = {name: torch.empty(local_shape(one, self.cut)) for name, one in shapes.items()}
        self.weight = nn.Parameter(empty["weight"])
        self.register_parameter("bias", nn.Parameter(empty["bias"]) if bias else None)
        self.register_module("adapter", None)

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        if self.adapter is not None:
            return self.adapter(x, self, groups)
        return self.product(x, groups)

    def product(self, x: Tensor, groups: Groups, change: GroupedLowRank | None = None) -> Tensor:
        """x [R, in here] (W[e] + change[e])^T + b[e] -> [R, out here]."""
        a, b, dropped = (None,) * 3 if change is None else (change.a, change.b, change.dropped)
        layout, scale = (None, 1.0) if change is None else (change.stacked, change.scale)
        return _Grouped.apply(x, self.weight, self.bias, a, b, dropped, layout, scale, groups, self.adds_bias)

    def extra_repr(self) -> str:
        sizes = f"{self.experts} x ({self.in_features} -> {self.out_features})"
        return f"{sizes}, {self.shard}, bias={self.bias is not None}"


class _Grouped(torch.autograd.Function):
    """out = x @ weight[e]^T + bias[e] + low @ block[e]^T for each row's expert e, with low = dropped @ a[e]^T and
    block[e] = scale * scatter(b[e]); without an adapter the first two terms.

    | tensor | shape | |
    | --- | --- | --- |
    | x, dropped | [R, in] | saved as far as a weight's gradient needs them |
    | low | [R, adapters * r] | saved |
    | grad_low = grad @ block[e] | [R, adapters * r] | |
    | grad_x = grad @ weight[e] (+ grad_low @ a[e] if x is dropped) | [R, in] | |
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        x_dropped: Tensor | None,
        layout: ops.LoraLayout | None,
        scale: float,
        groups: Groups,
        adds_bias: bool,
    ) -> Tensor:
        out = moe.grouped_linear(x, weight, bias if adds_bias else None, groups)
        dropped = x if x_dropped is None else x_dropped
        low = None
        if a is not None:
            low = moe.grouped_linear(dropped, a.to(x.dtype), None, groups)
            out += moe.grouped_linear(low, _block(b, layout, scale, x.dtype), None, groups)
        need_weight, need_a = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        ctx.save_for_backward(x if need_weight else None, dropped if need_a else None, low, weight, a, b)
        ctx.parameters = weight, a, b
        ctx.layout, ctx.scale, ctx.groups, ctx.adds_bias = layout, scale, groups, adds_bias
        ctx.has_dropped = x_dropped is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, dropped, low, weight, a, b = ctx.saved_tensors
        groups, grad = ctx.groups, grad.contiguous()
        need_x, need_weight, need_bias, need_a, need_b, need_dropped = ctx.needs_input_grad[:6]
        through_low = a is not None and (need_dropped or (need_x and not ctx.has_dropped))
        grad_x = grad_low = grad_dropped = grad_weight = grad_bias = grad_a = grad_b = None
        if need_x:
            grad_x = moe.grouped_input_grad(grad, weight, groups)
        if need_a or through_low:
            block = _block(b, ctx.layout, ctx.scale, grad.dtype)
            grad_low = moe.grouped_input_grad(grad, block, groups)
        if through_low:
            grad_dropped = moe.grouped_input_grad(grad_low, a.to(grad.dtype), groups)
            if not ctx.has_dropped:
                grad_x, grad_dropped = grad_x.add_(grad_dropped), None
        if need_weight:
            grad_weight = deferred.defer(ctx.parameters[0], lambda: moe.grouped_weight_grad(grad, x, groups))
        if need_a:
            dtype = a.dtype
            grad_a = deferred.defer(
                ctx.parameters[1], lambda: moe.grouped_weight_grad(grad_low, dropped, groups).to(dtype)
            )
        if need_b:
            grad_b = _grad_b(ctx, grad, low, b)
        if need_bias:
            # Where the bias is not added its gradient is zero, and the sum over etp complete.
            shape = groups.counts.shape[0], grad.shape[1]
            grad_bias = moe.grouped_sum(grad, groups) if ctx.adds_bias else grad.new_zeros(shape)
        return grad_x, grad_weight, grad_bias, grad_a, grad_b, grad_dropped, None, None, None, None


def _block(b: Tensor, layout: ops.LoraLayout, scale: float, dtype: torch.dtype) -> Tensor:
    """[E, adapted rows, r] -> [E, rows, adapters * r], the scale in it: grouped products take no factor. `layout`: of
    all experts' rows."""
    return layout.scatter((b.to(dtype) * scale).flatten(0, 1)).unflatten(0, (b.shape[0], -1))


def _grad_b(ctx: Any, grad: Tensor, low: Tensor, b: Tensor) -> Tensor | None:
    groups, layout, scale, shape, dtype = ctx.groups, ctx.layout, ctx.scale, b.shape, b.dtype

    def compute() -> Tensor:
        block = moe.grouped_weight_grad(grad, low, groups)
        return layout.gather(block.flatten(0, 1)).view(shape).to(dtype) * scale

    return deferred.defer(ctx.parameters[2], compute)


@dataclass(frozen=True, eq=False)
class _Exchange:
    """Who gets how many rows of whom over `ep`.

    `send`, `receive`: rows to and from each process. `order`, `inverse`: int64 [R], the received rows, which stand by
    sender and then expert, sorted by expert, and back. `groups`: of the rows by expert.
    """

    send: tuple[int, ...]
    receive: tuple[int, ...]
    order: Tensor
    inverse: Tensor
    groups: Groups


def _exchange(groups: Groups, keys: Tensor | None, ep: Axis) -> _Exchange:
    """From the rows that this process has for each of all experts. The host waits for the device once: sizes of what
    is sent must be known there."""
    here = groups.counts.shape[0] // ep.size
    counts = groups.counts
    arriving = exchange_rows(counts, ep, [here] * ep.size, [here] * ep.size)
    if moe.has_values(counts):
        sizes = torch.stack((counts, arriving)).view(2, ep.size, here).sum(2).tolist()
    else:
        sizes = [moe.balanced_counts(groups.rows, ep.size)] * 2
    rows = sum(sizes[1])
    local = torch.arange(here, device=counts.device).repeat(ep.size)
    expert_of_row = torch.repeat_interleave(local, arriving, output_size=rows)
    order = torch.argsort(expert_of_row, stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(rows, device=order.device))
    if keys is not None:
        keys = exchange_rows(keys, ep, *sizes).index_select(0, order)
    of_expert = Groups(arriving.view(ep.size, here).sum(0), rows, keys)
    return _Exchange(tuple(sizes[0]), tuple(sizes[1]), order, inverse, of_expert)


def through_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    num_experts: int,
    world: World,
    compute: Callable[[Tensor, Groups], Tensor],
    *,
    drops: bool = False,
    keys: Tensor | None = None,
) -> Tensor:
    """Each token's weighted sum of its experts' outputs: [T, H] -> [T, H], of the tokens that are here.

    `experts`: int64 [T, k] (`num_experts`: this choice is dropped; `drops`: there may be such), `weights`: fp32 [T,
    k]. `compute`: (rows [R, H] sorted by expert, their groups, of the experts that are here) -> [R, H], called once on
    every process, be it for no row. `keys`: int64 [T], names of the tokens that shall be in the groups. All processes
    of an ep and an etp line must call this together, those of an etp line with equally many tokens.
    """
    x, weights = gather(x, world.etp), gather(weights, world.etp)
    order = moe.sort_by_expert(gather_rows(experts, world.etp)[0], num_experts, drops)
    rows = moe.permute(x, order)
    if keys is not None:
        keys = gather_rows(keys, world.etp)[0].index_select(0, order.tokens)
    if world.ep.size == 1:
        rows = compute(rows, Groups(order.groups.counts, order.groups.rows, keys))
    else:
        plan = _exchange(order.groups, keys, world.ep)
        rows = all_to_all(rows, world.ep, plan.send, plan.receive)
        rows = compute(moe.reorder(rows, plan.order, plan.inverse), plan.groups)
        rows = moe.reorder(rows, plan.inverse, plan.order)
        rows = all_to_all(rows, world.ep, plan.receive, plan.send)
    return scatter_sum(moe.combine(rows, weights, order), world.etp)
