"""Ring attention (arXiv:2310.01889) on packed documents, balanced by zigzag.

The keys go round the context parallel processes while the queries stay, and the partial results join by their
log-sum-exp. Here a round is a shift: in round j each process sends to the process j places further, and only those keys
that its queries see. As all processes know the borders of the documents, what nobody sees is neither sent nor computed:
later chunks, other documents, keys before the window. With short documents next to nothing is sent, with one long
document as much as on a ring that passes whole chunks on, less a quarter. The gradients of keys and values go straight
back to the process they belong to, in the keys' dtype instead of travelling along as a sum in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatune.ops import Segments
from megatune.ops.attention_blocks import (
    add_sinks,
    block_attention,
    block_attention_backward,
    sinks_gradient,
)
from megatune.ops.checks import accumulate_dtype
from megatune.parallel.collectives import sum_, swap
from megatune.parallel.ring_plan import Meeting, Plan, plan_of
from megatune.parallel.world import Axis

_MET: WeakSet[dist.ProcessGroup] = WeakSet()  # groups that have communicated


def _pack(k: Tensor, v: Tensor, rows: Sequence[slice]) -> Tensor:
    """These rows of k, then these of v, as one message."""
    return torch.cat([x[part].reshape(-1) for x in (k, v) for part in rows])


def _unpack(message: Tensor, rows: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A message of `rows` rows -> (k, v) of the other process, shaped as those here."""
    keys, values = message.split((rows * k[0].numel(), rows * v[0].numel()))
    return keys.view(rows, *k.shape[1:]), values.view(rows, *v.shape[1:])


@dataclass
class _Transfer:
    """A message on its way out, and one on its way in with `rows` rows."""

    works: list[dist.Work]
    outgoing: Tensor | None
    incoming: Tensor | None
    rows: int

    def wait(self) -> Tensor | None:
        for work in self.works:
            work.wait()
        return self.incoming


def _transfer(
    outgoing: Tensor | None, to: int, rows: int, source: int, k: Tensor, v: Tensor, cp: Axis
) -> _Transfer:
    incoming = k.new_empty(rows * (k[0].numel() + v[0].numel())) if rows else None
    return _Transfer(swap(outgoing, to, incoming, source, cp), outgoing, incoming, rows)


def _fetch(plan: Plan, number: int, k: Tensor, v: Tensor, cp: Axis) -> _Transfer | None:
    """Start of the keys' way in round `number` + 1, None after the last."""
    if number == len(plan.rounds):
        return None
    this, step = plan.rounds[number], number + 1
    outgoing = _pack(k, v, this.sends) if this.sends else None
    to, source = (cp.rank + step) % cp.size, (cp.rank - step) % cp.size
    return _transfer(outgoing, to, this.receives, source, k, v, cp)


class _Ring(torch.autograd.Function):
    """q [T, Q, D], k [T, K, D], v [T, K, Dv], sinks [Q] or None -> [T, Q, Dv], T tokens of each process.

    Saved: these, the output, its log-sum-exp [Q, T]. Of others' keys at most two rounds are here at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        plan: Plan,
        cp: Axis,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        total: _Total | None = None
        pending = _fetch(plan, 0, k, v, cp)
        options = {"scale": scale, "softcap": softcap}
        for meeting in plan.own:
            part = block_attention(
                q[meeting.queries], k[meeting.keys], v[meeting.keys], meeting.block, **options
            )
            if total is None:
                total = _Total(*part)
            else:
                total.add(meeting.queries, *part)
        for number, this in enumerate(plan.rounds):
            message = pending.wait()
            pending = _fetch(plan, number + 1, k, v, cp)
            if not this.meetings:
                continue
            keys, values = _unpack(message, this.receives, k, v)
            for meeting in this.meetings:
                rows = meeting.keys
                part = block_attention(q[meeting.queries], keys[rows], values[rows], meeting.block, **options)
                total.add(meeting.queries, *part)
        out, lse = total.out, total.lse
        if sinks is not None:
            out, lse = add_sinks(out, lse, sinks)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.plan, ctx.cp, ctx.options = plan, cp, options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        plan, cp = ctx.plan, ctx.cp
        gradients = _Gradients(grad, q, out, lse, ctx.options)
        grad_k, grad_v = gradients.zeros(k), gradients.zeros(v)
        pending, returned = _fetch(plan, 0, k, v, cp), None
        for meeting in plan.own:
            gradients.add(meeting, k, v, grad_k, grad_v)
        for number, this in enumerate(plan.rounds):
            message = pending.wait()
            pending = _fetch(plan, number + 1, k, v, cp)
            found = None
            if this.meetings:
                keys, values = _unpack(message, this.receives, k, v)
                sums = (gradients.zeros(keys), gradients.zeros(values))
                for meeting in this.meetings:
                    gradients.add(meeting, keys, values, *sums)
                found = torch.cat([x.to(k.dtype).view(-1) for x in sums])
            back, ahead = (cp.rank - number - 1) % cp.size, (cp.rank + number + 1) % cp.size
            before, returned = returned, _transfer(found, back, this.sent, ahead, k, v, cp)
            if before is not None:
                _settle(before, plan.rounds[number - 1].sends, k, v, grad_k, grad_v)
        if returned is not None:
            _settle(returned, plan.rounds[-1].sends, k, v, grad_k, grad_v)
        grad_sinks = None if sinks is None else sinks_gradient(grad, out, lse, sinks)
        sums = zip((gradients.q_sum, grad_k, grad_v), (q, k, v), strict=True)
        grads = (whole.to(x.dtype) for whole, x in sums)
        return *grads, grad_sinks, None, None, None, None


class _Gradients:
    """Backward of all blocks of a process: `q_sum` [T, Q, D] is what its queries have got so far, in fp32."""

    def __init__(self, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, options: dict[str, Any]) -> None:
        self.grad, self.q, self.out, self.lse, self.options = grad, q, out, lse, options
        self.q_sum = self.zeros(q)

    def zeros(self, x: Tensor) -> Tensor:
        """A sum of gradients of x, nothing yet."""
        return x.new_zeros(x.shape, dtype=accumulate_dtype(x.dtype))

    def add(self, meeting: Meeting, keys: Tensor, values: Tensor, to_keys: Tensor, to_values: Tensor) -> None:
        """Adds one block's gradients to `q_sum`, and to the sums of these keys and values."""
        at, rows = meeting.queries, meeting.keys
        parts = block_attention_backward(
            self.grad[at],
            self.q[at],
            keys[rows],
            values[rows],
            self.out[at],
            self.lse[:, at],
            meeting.block,
            **self.options,
        )
        for whole, where, part in zip((self.q_sum, to_keys, to_values), (at, rows, rows), parts, strict=True):
            whole[where] += part


def _settle(
    returned: _Transfer, sends: Sequence[slice], k: Tensor, v: Tensor, grad_k: Tensor, grad_v: Tensor
) -> None:
    """Adds the gradients that came back for the rows `sends` of the keys and values here."""
    message = returned.wait()
    if message is None:
        return
    start = 0
    keys, values = _unpack(message, returned.rows, k, v)
    for rows in sends:
        stop = start + rows.stop - rows.start
        grad_k[rows] += keys[start:stop]
        grad_v[rows] += values[start:stop]
        start = stop


class _Total:
    """The softmax over the keys so far: `out` [T, Q, Dv] and `lse` [Q, T], both fp32."""

    def __init__(self, out: Tensor, lse: Tensor) -> None:
        self.out, self.lse = out.to(lse.dtype), lse

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Joins what queries `rows` found at further keys."""
        before = self.lse[:, rows]
        total = torch.logaddexp(before, lse)
        old, new = (torch.exp(part - total).t()[..., None] for part in (before, lse))
        self.out[rows] = self.out[rows] * old + out * new
        self.lse[:, rows] = total


def ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    cp: Axis,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention over the whole stream for the tokens that are here; see `context.attention`."""
    if cp.group not in _MET:
        # NCCL connects a group in its first call, and that one all of its processes must make.
        sum_(q.new_zeros(1), cp)
        _MET.add(cp.group)
    return _Ring.apply(q, k, v, sinks, plan_of(segments, cp.rank, cp.size, window), cp, scale, softcap)
