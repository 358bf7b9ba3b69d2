"""Communication within a layer: every byte that tensor, context and expert parallelism send goes through here.

Tensors are local and plain; dimension 0 is that of the tokens. On an axis of one process each function is the identity.
Functions without autograd come first, then the differentiable ones, named by what they do forward:

| forward | backward |
| --- | --- |
| `gather`: [T / n, ..] -> [T, ..], all-gather | reduce-scatter (sum) |
| `scatter_sum`: [T, ..] partial -> [T / n, ..], reduce-scatter | all-gather |
| `reduce`: partial -> sum, all-reduce | identity |
| `copy`: identity | all-reduce (sum) |
| `split`: [T, ..] -> this process's [T / n, ..] | all-gather |
| `all_to_all`: rows to and from every process | the reverse |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatune.ops.comm import all_gather, reduce_scatter
from megatune.parallel.world import Axis


def gather_rows(x: Tensor, axis: Axis, *, async_op: bool = False) -> tuple[Tensor, dist.Work | None]:
    """([n * rows, ..], work): the processes' rows one after the other. Wait for `work` (if any) before use."""
    if axis.size == 1:
        return x, None
    out = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    work = all_gather(out, x.contiguous(), group=axis.group, async_op=async_op)
    return out, work


def scatter_sum_rows(x: Tensor, axis: Axis, *, async_op: bool = False) -> tuple[Tensor, dist.Work | None]:
    """([rows / n, ..], work): this process's rows of the sum over the axis. Wait for `work` (if any) before use."""
    if axis.size == 1:
        return x, None
    out = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    work = reduce_scatter(out, x.contiguous(), group=axis.group, async_op=async_op)
    return out, work


def sum_(x: Tensor, axis: Axis) -> Tensor:
    """`x` (contiguous) becomes its sum over the axis, in place; returns it."""
    if axis.size > 1:
        dist.all_reduce(x, group=axis.group)
    return x


def max_(x: Tensor, axis: Axis) -> Tensor:
    """`x` (contiguous) becomes its largest over the axis, in place; returns it."""
    if axis.size > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=axis.group)
    return x


def exchange_rows(x: Tensor, axis: Axis, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """`send[i]` rows of x, in order, to process i; -> `receive[i]` rows from each process i, in order."""
    if axis.size == 1:
        return x
    out = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=axis.group)
    return out


def swap(
    outgoing: Tensor | None, to: int, incoming: Tensor | None, source: int, axis: Axis
) -> list[dist.Work]:
    """Starts sending `outgoing` to process `to` of the axis and receiving `incoming` from `source` (contiguous; None:
    nothing). Wait for the works before the tensors are read or written. All processes call it in the same order."""
    ops = []
    if outgoing is not None:
        ops.append(dist.P2POp(dist.isend, outgoing, axis.ranks[to], axis.group))
    if incoming is not None:
        ops.append(dist.P2POp(dist.irecv, incoming, axis.ranks[source], axis.group))
    return dist.batch_isend_irecv(ops) if ops else []


def arriving(x: Tensor, out: Tensor, axis: Axis) -> Iterator[tuple[int, Tensor]]:
    """An all-gather of x [rows, ..] to `out` [n * rows, ..] in pieces: (process, its rows in `out`), this one's first,
    then each as it arrives. All are on their way before the first is given out."""
    x = x.contiguous()
    rows = out.view(axis.size, *x.shape)
    coming = []
    for step in range(1, axis.size):
        source = (axis.rank - step) % axis.size
        coming.append((source, swap(x, (axis.rank + step) % axis.size, rows[source], source, axis)))
    rows[axis.rank] = x
    yield axis.rank, rows[axis.rank]
    for source, works in coming:
        for work in works:
            work.wait()
        yield source, rows[source]


def summed(produce: Callable[[int, Tensor], None], like: Tensor, axis: Axis) -> Tensor:
    """The sum over the axis of what each process has for this one, as a reduce-scatter in pieces: `produce(i, out)`
    writes this process's part for process i to `out`, which is sent while the next one is produced. `like`: a tensor
    of a part's shape and dtype. Summed at once, so rounded once."""
    parts = like.new_empty(axis.size, *like.shape)
    sent = []
    for step in range(1, axis.size):
        to = (axis.rank + step) % axis.size
        part = torch.empty_like(like)
        produce(to, part)
        # Held until it has gone.
        sent.append((part, swap(part, to, parts[step], (axis.rank - step) % axis.size, axis)))
    produce(axis.rank, parts[0])
    for _, works in sent:
        for work in works:
            work.wait()
    return parts.sum(0)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return gather_rows(x, axis)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return scatter_sum_rows(grad, ctx.axis)[0], None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return scatter_sum_rows(x, axis)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gather_rows(grad, ctx.axis)[0], None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return sum_(x.clone(memory_format=torch.contiguous_format), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_(grad.clone(memory_format=torch.contiguous_format), ctx.axis), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        rows = x.shape[0] // axis.size
        return x.narrow(0, axis.rank * rows, rows).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gather_rows(grad, ctx.axis)[0], None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        ctx.axis, ctx.send, ctx.receive = axis, send, receive
        return exchange_rows(x, axis, send, receive)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange_rows(grad, ctx.axis, ctx.receive, ctx.send), None, None, None


def gather(x: Tensor, axis: Axis) -> Tensor:
    """[T / n, ..] -> [T, ..]; the gradient is summed over the axis and scattered."""
    return x if axis.size == 1 else _Gather.apply(x, axis)


def scatter_sum(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums [T, ..] -> this process's rows [T / n, ..] of their sum; the gradient is gathered."""
    return x if axis.size == 1 else _ScatterSum.apply(x, axis)


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums -> their sum, on every process; the gradient passes as it is."""
    return x if axis.size == 1 else _Reduce.apply(x, axis)


def copy(x: Tensor, axis: Axis) -> Tensor:
    """x itself; its gradient is summed over the axis."""
    return x if axis.size == 1 else _Copy.apply(x, axis)


def split(x: Tensor, axis: Axis) -> Tensor:
    """This process's rows [T / n, ..] of an x [T, ..] that all have; the gradient is gathered."""
    return x if axis.size == 1 else _Split.apply(x, axis)


def all_to_all(x: Tensor, axis: Axis, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """`send[i]` rows of x to process i, in order -> [sum(receive), ..], process by process."""
    return x if axis.size == 1 else _AllToAll.apply(x, axis, tuple(send), tuple(receive))
