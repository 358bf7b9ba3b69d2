"""The pipeline engine: a rank's stages run the actions of a schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatune.ops import Segments
from megatune.parallel import deferred
from megatune.parallel.collectives import max_
from megatune.parallel.context import MicroBatch
from megatune.parallel.pipeline.p2p import Inbox, Lines
from megatune.parallel.pipeline.partition import virtual_of
from megatune.parallel.pipeline.plan import Message, Plan, Traffic, evaluation_plan, training_plan
from megatune.parallel.pipeline.schedules import Action, owners
from megatune.parallel.stages import Stage
from megatune.parallel.world import World

BeginBackward = Callable[[int, bool], None]


class Pipeline:
    """Forward and backward of a model whose stages are on the ranks of `world.pp`; a plain loop where that is one.

    `model`: a `Decoder` with the stages of this rank, or what wraps one; called as `model(tokens or hidden states,
    segments, targets of the last stage or None, stage=place in model.stages)`. `dtype`: of the hidden states between
    stages, on all ranks: the one the model computes in. `trains`: for each stage of the model whether a parameter of it
    is trained; default: the ranks tell each other, so all must make their Pipeline at the same time.

    Lengths may differ from one micro-batch to the next. Ranks of one pipeline get the same micro-batches. An error on
    one rank is raised there; the others then wait until the process group's timeout or until somebody ends them.
    ValueError where the model's stages are not those that the layout gives this rank.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        *,
        dtype: torch.dtype,
        trains: Sequence[bool] | None = None,
    ) -> None:
        self.model, self.world, self.dtype = model, world, dtype
        self.stages: tuple[Stage, ...] = model.stages
        self.local = {stage.number: place for place, stage in enumerate(self.stages)}
        self._layout = (world.config.schedule, world.pp.size, virtual_of(world.config))
        owner = owners(*self._layout) if world.pp.size > 1 else [0]
        mine = tuple(number for number, rank in enumerate(owner) if rank == world.pp.rank)
        if tuple(self.local) != mine or self.stages[0].count != len(owner):
            raise ValueError(
                f"the model has stages {tuple(self.local)} of {self.stages[0].count}; pipeline rank {world.pp.rank} "
                f"of {world.pp.size} with schedule {world.config.schedule} has {mine} of {len(owner)}"
            )
        if world.pp.size > 1:
            trains = self._ask_which_train() if trains is None else trains
            wanted = tuple(any(trains[:number]) for number in range(len(owner)))
            self.traffic = Traffic(tuple(owner), wanted)
            self.lines = Lines(world, self.traffic.channels())

    def train(self, batches: Sequence[MicroBatch], scale: float, begin_backward: BeginBackward) -> Tensor:
        """Forward and backward of a step's micro-batches; gradients of scale * (sum of their losses) are added to the
        parameters'. Returns that sum, fp64, where this rank has the last stage, else 0.

        `begin_backward(stage, is_last)` is called once for each micro-batch and stage (its place in `model.stages`),
        right before its backward; `is_last`: it is the last micro-batch of that stage in this step. Zero-bubble
        schedules begin with the gradients of inputs, and of those parameters that do not ask `deferred.defer`
        (embeddings, norms); those of the others come when the next backwards may have begun already, always in the
        order of the micro-batches. A parameter that two stages of a rank share (tied embeddings under zbv) gets
        gradients from both.
        """
        if self.world.pp.size == 1:
            return self._train_alone(batches, scale, begin_backward)
        name, pp, virtual = self._layout
        plan = training_plan(name, pp, virtual, self.world.pp.rank, self.traffic.wanted, len(batches))
        return _Run(self, plan, batches).train(scale, begin_backward)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Sum of the micro-batches' losses, fp64, where this rank has the last stage, else 0. Any number will do."""
        if self.world.pp.size == 1:
            total = self.zero()
            for batch in batches:
                total += self.model(batch.tokens, batch.segments, batch.targets, stage=0)
            return total
        plan = evaluation_plan(*self._layout, self.world.pp.rank, len(batches))
        return _Run(self, plan, batches).evaluate()

    @torch.no_grad()
    def logits(self, tokens: Tensor, segments: Segments, cache: Any = None) -> Tensor:
        """Logits [1, V] of the token after `tokens`, on every rank. `cache`: this rank's own."""
        if self.world.pp.size == 1:
            return self.model(tokens, segments, cache=cache)[-1:]
        handed: Tensor = tokens
        sends: list[tuple[dist.Work, Tensor]] = []
        for place, stage in enumerate(self.stages):
            if not stage.is_first:
                message = Message("F", stage.number - 1, 0)
                channel = self.traffic.channel(message)
                if channel is not None:
                    # Generation decides by itself how the rows are cut: ask the sender.
                    source = self.world.pp.ranks[channel.source]
                    rows = _receive_shape(source)
                    handed = tokens.new_empty(*rows, self.model.spec.hidden_size, dtype=self.dtype)
                    self.lines.receive(handed, channel).wait()
            handed = self.model(handed, segments, cache=cache, stage=place)
            channel = None if stage.is_last else self.traffic.channel(Message("F", stage.number, 0))
            if channel is not None:
                _send_shape(handed.shape[:1], self.world.pp.ranks[channel.target])
                sends.append((self.lines.send(self.checked(handed), channel), handed))
        for work, _ in sends:
            work.wait()
        return self._spread(handed)

    def checked(self, hidden: Tensor) -> Tensor:
        """Hidden states or their gradient as they can be sent."""
        if hidden.dtype != self.dtype:
            raise TypeError(
                f"a stage gave {hidden.dtype}, the pipeline was made for {self.dtype} between stages"
            )
        return hidden.detach().contiguous()

    def _train_alone(
        self, batches: Sequence[MicroBatch], scale: float, begin_backward: BeginBackward
    ) -> Tensor:
        total = self.zero()
        for index, batch in enumerate(batches):
            loss = self.model(batch.tokens, batch.segments, batch.targets, stage=0) * scale
            begin_backward(0, index == len(batches) - 1)
            loss.backward()
            total += loss.detach()
        return total

    def _spread(self, logits: Tensor) -> Tensor:
        """The last row of the last stage's logits, on every rank of the pipeline."""
        axis = self.world.pp
        root = axis.ranks[self.traffic.owner[-1]]
        if self.stages[-1].is_last:
            logits = logits[-1:].contiguous()
            code = _DTYPES.index(logits.dtype)
            for rank in axis.ranks:
                if rank != root:
                    _send_shape((logits.shape[1], code), rank)
        else:
            columns, code = _receive_shape(root, 2)
            logits = torch.empty(1, columns, dtype=_DTYPES[code], device=self.world.device)
        dist.broadcast(logits, root, axis.group)
        return logits

    def zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.world.device)

    def _ask_which_train(self) -> list[bool]:
        flags = torch.zeros(self.stages[0].count, dtype=torch.int32, device=self.world.device)
        for name, parameter in self.model.named_parameters():
            for stage in self.stages:
                if parameter.requires_grad and self._belongs(name, stage):
                    flags[stage.number] = 1
        return [bool(flag) for flag in max_(flags, self.world.pp).tolist()]

    def _belongs(self, name: str, stage: Stage) -> bool:
        """Whether a stage computes with the parameter of this global name."""
        room, *rest = name.split(".")
        if room == "layers":
            return int(rest[0]) in stage.layers
        if room in ("embed", "positions"):
            tied = room == "embed" and self.model.spec.tied_embeddings
            return stage.is_first or (stage.is_last and tied)
        return stage.is_last


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _send_shape(numbers: Sequence[int], target: int) -> None:
    """A few integers between the hosts: they never wait for the device."""
    dist.send(torch.tensor(tuple(numbers), dtype=torch.int64), target)


def _receive_shape(source: int, count: int = 1) -> list[int]:
    numbers = torch.empty(count, dtype=torch.int64)
    dist.recv(numbers, source)
    return numbers.tolist()


class _Ending(torch.autograd.Function):
    """The end of a stage's graph for its backward, without the values that have been sent.

    An empty tensor that hangs on `out`; its backward goes on with the gradient of `out` that lies in `slot` by then.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, slot: list[Tensor]) -> Tensor:
        ctx.slot = slot
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.slot.pop(), None


class _Run:
    """One pass of micro-batches through this rank's stages."""

    def __init__(self, pipeline: Pipeline, plan: Plan, batches: Sequence[MicroBatch]) -> None:
        self.pipeline, self.plan, self.batches = pipeline, plan, batches
        self.traffic, self.lines = pipeline.traffic, pipeline.lines
        self.inbox = Inbox(self.lines, plan.incoming, self._empty)
        self.handed: dict[Message, Tensor] = {}
        self.sent: dict[Message, tuple[dist.Work, Tensor]] = {}
        # By (stage, micro-batch): the stage's input, the end of its graph, where the gradient of its output goes, and
        # weight gradients put off.
        self.inputs: dict[tuple[int, int], Tensor] = {}
        self.endings: dict[tuple[int, int], tuple[Tensor, list[Tensor]]] = {}
        self.queues: dict[tuple[int, int], deferred.Queue] = {}
        self.total = pipeline.zero()

    def train(self, scale: float, begin_backward: BeginBackward) -> Tensor:
        for place, action in enumerate(self.plan.actions):
            given = self._take(self.traffic.needed(action))
            self._let_go(place)
            if action.kind == "F":
                self._forward(action, given, scale)
                continue
            if action.kind == "W":
                self.queues.pop((action.stage, action.micro_batch)).run()
            else:
                begin_backward(self.pipeline.local[action.stage], self.plan.is_last[place])
                self._backward(action, given)
        self._finish()
        return self.total

    def evaluate(self) -> Tensor:
        for place, action in enumerate(self.plan.actions):
            given = self._take(self.traffic.needed(action))
            self._let_go(place)
            out = self._call(action, given)
            if action.stage == self.traffic.last:
                self.total += out
            else:
                self._give(self.traffic.made(action), out)
        self._finish()
        return self.total

    def _call(self, action: Action, given: Tensor | None) -> Tensor:
        batch = self.batches[action.micro_batch]
        targets = batch.targets if action.stage == self.traffic.last else None
        place = self.pipeline.local[action.stage]
        return self.pipeline.model(
            batch.tokens if given is None else given, batch.segments, targets, stage=place
        )

    def _forward(self, action: Action, given: Tensor | None, scale: float) -> None:
        key = (action.stage, action.micro_batch)
        if given is not None:
            self.inputs[key] = given.requires_grad_(self.traffic.wanted[action.stage])
        out = self._call(action, given)
        slot: list[Tensor] = []
        if action.stage == self.traffic.last:
            ending = out * scale
            self.total += ending.detach()
        else:
            self._give(self.traffic.made(action), out)
            ending = _Ending.apply(out, slot)
        self.endings[key] = ending, slot

    def _backward(self, action: Action, given: Tensor | None) -> None:
        key = (action.stage, action.micro_batch)
        ending, slot = self.endings.pop(key)
        taken = self.inputs.pop(key, None)
        queue = deferred.Queue()
        if ending.requires_grad:
            if given is not None:
                slot.append(given)
            if action.kind == "I":
                with deferred.collecting() as queue:
                    ending.backward()
            else:
                ending.backward()
        if action.kind == "I":
            self.queues[key] = queue
        message = self.traffic.made(action)
        if message is not None:
            self._give(message, taken.grad)

    def _take(self, message: Message | None) -> Tensor | None:
        if message is None:
            return None
        channel = self.traffic.channel(message)
        return self.handed.pop(message) if channel is None else self.inbox.take(message, channel)

    def _give(self, message: Message, tensor: Tensor) -> None:
        tensor = self.pipeline.checked(tensor)
        channel = self.traffic.channel(message)
        if channel is None:
            self.handed[message] = tensor
        else:
            self.sent[message] = self.lines.send(tensor, channel), tensor

    def _let_go(self, place: int) -> None:
        """Sent tensors that have been received."""
        for message in self.plan.received[place]:
            work, _ = self.sent.pop(message)
            work.wait()

    def _finish(self) -> None:
        for work, _ in self.sent.values():
            work.wait()

    def _empty(self, message: Message) -> Tensor:
        """A buffer for hidden states or their gradient: [T / cp / tp, H]."""
        world = self.pipeline.world
        rows = self.batches[message.micro_batch].segments.tokens // world.tp.size
        size = self.pipeline.model.spec.hidden_size
        return torch.empty(rows, size, dtype=self.pipeline.dtype, device=world.device)
