"""ZeRO (arXiv:1910.02054) 0 to 3 over any layout: masters, reduction of gradients, weights for compute.

| stage | gradients | masters and moments | weights |
| --- | --- | --- | --- |
| 0 | whole; all-reduced once a step | whole | whole |
| 1 | whole; reduce-scattered once a step | sharded | whole; gathered after the update |
| 2 | sharded; reduce-scattered in every micro-batch | sharded | whole; gathered after the update |
| 3 | as 2 | sharded | sharded; gathered layer by layer (`units`) |

Over the replicas of hybrid sharding gradients are summed once a step. Stages 0 to 2 are buckets of our own (`buckets`);
at stage 3 these hold what is not sharded but trained. Frozen weights have neither masters nor gradients; below stage 3
they are never sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatune.parallel.buckets import Bucket, Member, Pool, fill, is_matrix
from megatune.parallel.collectives import sum_
from megatune.parallel.shard import Box, Cut, Parts, ShardSpec, local_shape, parts_of_flat, parts_of_local
from megatune.parallel.units import Units, is_adapter, is_base_matrix
from megatune.parallel.world import World

_EMBEDDING = "embed.weight"


@dataclass(eq=False)
class Master:
    """This process's shard of a trainable parameter, in fp32 or, where the optimizer keeps no fp32 master, in the
    compute dtype; on the host where the optimizer is offloaded.

    `tensor`, `grad`: of one shape; flat [n], padded with zeros, or a box of the local tensor. `grad`, in fp32, is valid
    after `Zero.finish`. `counts`: of the processes that hold the same elements, this one counts them (in the gradient's
    norm) and writes them. `run`: (flat masters, flat gradients, first element) where it stands in line with others;
    `rounded(first element, elements)` then gives what an update may fill with the new masters in the compute dtype
    (`Bucket.rounded`).
    """

    name: str
    spec: ShardSpec
    tensor: Tensor
    grad: Tensor | None
    counts: bool
    cut: Cut
    start: int = 0
    at: Box | None = None
    run: tuple[Tensor, Tensor, int] | None = None
    rounded: Callable[[int, int], Tensor | None] | None = None

    @property
    def is_matrix(self) -> bool:
        return is_matrix(self.spec)

    def parts(self, like: Tensor) -> Parts:
        """`Parts` of a tensor that is sharded as this one: of `tensor` itself, or a moment in its shape."""
        if self.at is None:
            return parts_of_flat(self.spec, self.cut, like.view(-1), self.start, self.counts)
        return parts_of_local(self.spec, self.cut, like, self.counts, at=self.at)


class Zero:
    """What `world.config.zero` says, for a `model` on meta.

    `specs`: its parameters by name. Trainable ones must be fp32; base weights are cast to `compute_dtype` for compute,
    adapters cast by themselves. Frozen ones keep the dtype that they have. `master_dtype`: of the masters of base
    matrices, fp32 or `compute_dtype`; all other masters are fp32.

    Use: `materialise`, fill the tensors of `weights()`, `publish`. Then each step: `begin_backward` before each
    backward, `finish`, update the `masters`, `publish`, `zero_grad`.
    """

    def __init__(
        self,
        model: nn.Module,
        specs: Mapping[str, ShardSpec],
        world: World,
        compute_dtype: torch.dtype,
        master_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._model, self._world, self._compute_dtype = model, world, compute_dtype
        self._master_dtype = master_dtype
        held = dict(model.named_parameters()) | dict(model.named_buffers())
        self._specs = {name: spec for name, spec in specs.items() if name in held}
        unknown = [name for name, _ in model.named_parameters() if name not in specs]
        if unknown:
            raise ValueError(f"no ShardSpec for {unknown}")
        self._local_stages = getattr(model, "stages", None)
        self._tied = bool(getattr(getattr(model, "spec", None), "tied_embeddings", False))
        self._trained = [name for name, p in model.named_parameters() if p.requires_grad]
        zero = world.config.zero
        self._units = None
        if zero == 3:
            self._units = Units(model, specs, world, compute_dtype, self._stages_of, master_dtype)
        sharded = self._units.names if self._units else frozenset()
        # Backward with weight gradients put off: those of a micro-batch still come when the next has begun.
        self._puts_off = world.pp.size > 1 and world.config.schedule.startswith("zb")
        self._plan([name for name in self._trained if name not in sharded])
        self._masters: dict[str, Master] = {}
        self._waiting: deque[tuple[Bucket, int, bool]] = deque()
        self._flying: list[Bucket] = []
        self._begun: list[Bucket] = []
        self._hooks: list[Any] = []  # handles of what is called when a gradient is ready
        self._stream: torch.cuda.Stream | None = None

    def _plan(self, names: list[str]) -> None:
        members = []
        for name in names:
            spec, stages = self._specs[name], self._stages_of(name)
            dtype = torch.float32 if is_adapter(name) else self._compute_dtype
            kept = self._master_dtype if is_base_matrix(spec) else torch.float32
            key = (spec.expert, dtype, stages, kept)
            members.append(Member(name, spec, local_shape(spec, self._world.cut), key))
        world, stage = self._world, min(self._world.config.zero, 2)
        self._buckets: list[Bucket] = []
        self._of_stage: dict[int, list[Bucket]] = {}
        for group in fill(members):
            expert, dtype, stages, kept = group[0].key
            axis = world.efsdp if expert else world.fsdp
            is_late, puts_off = len(stages) > 1, self._puts_off
            rest = {"puts_off": puts_off, "offloads": world.config.offload_optimizer}
            bucket = Bucket(group, dtype, kept, axis, world.dp_replicate, stage, is_late=is_late, **rest)
            self._buckets.append(bucket)
            if not bucket.is_late:
                self._of_stage.setdefault(stages[0], []).append(bucket)

    def _stages_of(self, name: str) -> tuple[int, ...]:
        """The local pipeline stages that use a parameter."""
        if self._local_stages is None:
            return (0,)
        stages = list(enumerate(self._local_stages))
        first = tuple(i for i, stage in stages if stage.is_first)
        last = tuple(i for i, stage in stages if stage.is_last)
        if name.startswith("layers."):
            index = int(name.split(".")[1])
            return tuple(i for i, stage in stages if index in stage.layers)
        if name.startswith("embed."):
            return tuple(sorted({*first, *last})) if self._tied else first
        return first if name.startswith("positions.") else last

    # Memory and weights.

    def materialise(self, device: torch.device | str) -> None:
        """Give the model and the masters memory on `device`; the values are undefined until they are filled."""
        device = torch.device(device)
        if self._units is not None:
            # What to_empty does, by an _empty that is quick.
            self._model._apply(lambda tensor: _empty(tensor, device))
        else:
            self._allocate_frozen(device)
        pool = Pool(device)
        for bucket in self._buckets:
            bucket.allocate(device, pool)
        found = {master.name: master for master in (*self._of_buckets(), *self._of_units())}
        self._masters = {name: found[name] for name in self._trained}
        if device.type == "cuda" and torch.cuda.is_available() and self._world.config.overlap:
            self._stream = torch.cuda.Stream(device)
        self.zero_grad()

    def close(self) -> None:
        """Let go of the model: its memory is free once nobody else has it. (Hooks of parameters hold this object in a
        cycle that Python cannot see.)"""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for parameter in self._model.parameters():
            vars(parameter).pop("grad_ready", None)

    def _allocate_frozen(self, device: torch.device) -> None:
        trained = set(self._trained)
        for name, p in list(self._model.named_parameters()):
            if name not in trained:
                self._replace(name, _empty(p, device), False)
        for module in self._model.modules():
            for key, value in module._buffers.items():
                if value is not None and value.is_meta:
                    module._buffers[key] = _empty(value, device)

    def _replace(self, name: str, value: Tensor, requires_grad: bool) -> nn.Parameter:
        path, _, key = name.rpartition(".")
        parameter = nn.Parameter(value, requires_grad)
        self._model.get_submodule(path)._parameters[key] = parameter
        return parameter

    def _of_buckets(self) -> Iterator[Master]:
        self._direct: list[tuple[nn.Parameter, Tensor]] = []
        for bucket in self._buckets:
            index_of_shard = bucket.axis.rank if bucket.shards > 1 else 0
            for index, slot in enumerate(bucket.slots):
                parameter = self._replace(slot.name, bucket.weight_of(slot), True)
                if bucket.is_direct:
                    grad = bucket.grad[slot.start : slot.start + slot.numel].view(slot.shape)
                    self._direct.append((parameter, grad))
                if bucket.sends or not bucket.is_direct:
                    ready = partial(self._ready, bucket, index)
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(ready))
                    parameter.grad_ready = ready  # for gradients that do not come from autograd (`deferred`)
                yield Master(
                    slot.name,
                    slot.spec,
                    bucket.shard_of(bucket.master, slot),
                    bucket.shard_of(bucket.grad, slot),
                    self._counts(slot.spec, bucket.shards > 1),
                    self._world.cut,
                    start=index_of_shard * slot.chunk,
                    run=(bucket.master, bucket.grad, slot.start),
                    rounded=bucket.rounded,
                )

    def _of_units(self) -> Iterator[Master]:
        if self._units is None:
            return
        for name, (parameter, local) in self._units.tensors().items():
            if parameter.requires_grad:
                spec = self._specs[name]
                at = self._units.box(name, local_shape(spec, self._world.cut))
                yield Master(name, spec, local, None, self._counts(spec, True), self._world.cut, at=at)

    def _counts(self, spec: ShardSpec, is_sharded: bool) -> bool:
        """Whether this process is the first of those that hold the same elements."""
        world = self._world
        axis, cut = (world.efsdp, world.etp) if spec.expert else (world.fsdp, world.tp)
        is_first = world.dp_replicate.is_first and (is_sharded or axis.is_first)
        is_first = is_first and (spec.tensor_dim is not None or cut.is_first)
        return is_first and not (spec.name == _EMBEDDING and self._twin() == 0)

    def _twin(self) -> int | None:
        """The place in the pipeline of the process that has the other copy of tied embeddings."""
        if self._world.pp.size == 1 or not self._tied or self._local_stages is None:
            return None
        has_first = self._local_stages[0].is_first
        has_last = self._local_stages[-1].is_last
        if has_first == has_last:
            return None
        return self._world.pp.size - 1 if has_first else 0

    def masters(self) -> dict[str, Master]:
        """The trainable parameters by name, in the model's order."""
        return self._masters

    def weights(self) -> dict[str, Parts]:
        """Every parameter held here: the masters of trainable ones, the frozen ones themselves. What is filled into
        masters reaches the model with `publish`."""
        sharded = self._units.tensors() if self._units is not None else {}
        live = dict(self._model.named_parameters()) | dict(self._model.named_buffers())
        found = {}
        for name, spec in self._specs.items():
            if name in self._masters:
                found[name] = self._masters[name].parts(self._masters[name].tensor)
                continue
            local = sharded[name][1] if name in sharded else live[name].detach()
            at = self._units.box(name, local_shape(spec, self._world.cut)) if name in sharded else None
            found[name] = parts_of_local(
                spec, self._world.cut, local, self._counts(spec, name in sharded), at=at
            )
        return found

    @torch.no_grad()
    def publish(self) -> None:
        """Masters -> weights used in compute. At stages 1 and 2 one bucket is gathered while the one before is put in
        place."""
        before: Bucket | None = None
        for bucket in reversed(self._buckets):
            bucket.gather()
            if not self._world.config.overlap:
                bucket.scatter()
            elif before is not None:
                before.scatter()
            before = bucket
        if before is not None:
            before.scatter()

    # Gradients.

    def begin_backward(self, stage: int, is_last: bool) -> None:
        """Before each backward of local pipeline stage `stage`; `is_last`: the last of that stage in this step.

        All processes that share a parameter must call it in the same order: this is the order of the reductions.
        """
        if not self._puts_off:
            self._flush()
        self._begun = self._of_stage.get(stage, [])
        for bucket in self._begun:
            bucket.begun += 1
            if is_last or bucket.reduces_each:
                self._waiting.append((bucket, bucket.begun, is_last))
        if self._units is not None:
            self._units.begin(stage, is_last)

    def _ready(self, bucket: Bucket, index: int, parameter: nn.Parameter) -> None:
        """A gradient is there. Reductions start strictly in the order of `begin_backward` and buckets, whichever
        gradients come first, so that all processes start the same ones."""
        if parameter.grad is None:  # put off
            return
        if not bucket.is_direct:
            bucket.add(index, parameter.grad)
            parameter.grad = None
        elif bucket.is_closed:
            raise RuntimeError(f"a gradient of {bucket.slots[index].name} came after its reduction")
        if bucket.arrive(index):
            while self._waiting and self._waiting[0][0].complete >= self._waiting[0][1]:
                self._launch()

    def _launch(self) -> None:
        bucket, _, is_last = self._waiting.popleft()
        if bucket in self._flying:
            self._flying.remove(bucket)
            bucket.collect()
        if not bucket.sends:
            bucket.launch(is_last)
            return
        with self._beside():
            bucket.launch(is_last)
            if self._stream is not None or not self._world.config.overlap:
                bucket.collect()
            else:
                self._flying.append(bucket)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream of reductions, after all that has been queued so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def _flush(self) -> None:
        """Start the reductions of all backwards that have begun, though gradients are missing: they count as zero."""
        while self._waiting:
            self._launch()
        for bucket in self._begun:
            bucket.settle()

    @torch.no_grad()
    def finish(self) -> None:
        """After the last backward: wait for the reductions, sum what tensor parallelism and tied embeddings leave to
        be summed. Then the masters' `grad` is the gradient."""
        self._flush()
        for bucket in self._buckets:
            if not bucket.is_closed:
                self._waiting.append((bucket, bucket.begun, True))
                self._launch()
        for bucket in self._flying:
            bucket.collect()
        self._flying.clear()
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        if self._units is not None:
            for name, grad in self._units.gradients().items():
                if (master := self._masters.get(name)) is not None:
                    if grad is None:
                        grad = torch.zeros_like(master.tensor, dtype=torch.float32)
                    master.grad = grad
        self._sum_partial()
        self._sum_tied()

    def _sum_partial(self) -> None:
        """Parameters replicated over tensor parallel processes have seen a part of the tokens on each: one all-reduce
        for all of them."""
        for axis, expert in ((self._world.tp, False), (self._world.etp, True)):
            grads = [
                master.grad
                for master in self._masters.values()
                if master.spec.partial and master.spec.expert == expert and master.grad.numel()
            ]
            if axis.size > 1 and grads:
                flat = sum_(torch.cat([grad.reshape(-1) for grad in grads]), axis)
                pieces = flat.split([grad.numel() for grad in grads])
                torch._foreach_copy_(
                    grads, [piece.view_as(grad) for piece, grad in zip(pieces, grads, strict=True)]
                )

    def _sum_tied(self) -> None:
        """The first and the last stage each have a copy of tied embeddings, and a part of their gradient."""
        twin, master = self._twin(), self._masters.get(_EMBEDDING)
        if twin is None or master is None or not master.grad.numel():
            return
        pp = self._world.pp
        mine, other = master.grad.contiguous(), torch.empty_like(master.grad)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, mine, pp.ranks[twin], pp.group),
                dist.P2POp(dist.irecv, other, pp.ranks[twin], pp.group),
            ]
        )
        for work in works:
            work.wait()
        master.grad.add_(other)

    def zero_grad(self) -> None:
        """Forget all gradients; before the first backward of a step."""
        self._waiting.clear()
        for bucket in self._buckets:
            bucket.clear()
        for parameter, grad in self._direct:
            parameter.grad = grad
        if self._units is not None:
            self._units.clear()
            for name in self._units.names & self._masters.keys():
                self._masters[name].grad = None


def _empty(tensor: Tensor, device: torch.device) -> Tensor:
    """Memory for a contiguous meta tensor."""
    if type(tensor) not in (Tensor, nn.Parameter):  # a DTensor
        return torch.empty_like(tensor, device=device)
    # Not empty_like: of a meta tensor it loads torch's symbolic shapes, which takes half a second.
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
