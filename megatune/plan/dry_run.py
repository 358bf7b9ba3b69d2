"""One process of any layout on this machine: its own code, on tensors without memory and with sends that go nowhere.

`torch`'s fake process group says that this is rank r of n; under `Tracker` tensors are on meta and have no values, so
the model, ZeRO, the optimizer and the pipeline of that rank are built and run a whole step as they would there.
(`FakeTensorMode` would tell "cpu" from "meta", and take four times as long.)
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatune import adapters, models, optim
from megatune.config.layout import Layout, check_batch
from megatune.config.schema import Config
from megatune.models import DecoderSpec
from megatune.models.layout import stage_costs
from megatune.models.moe import set_balance, update_correction
from megatune.models.rope import inverse_frequencies
from megatune.ops import Segments, Targets
from megatune.ops.cross_entropy import CHUNK_LOGITS
from megatune.ops.registry import shapes_only
from megatune.parallel import World, make_world
from megatune.parallel.context import MicroBatch, shard_stream
from megatune.parallel.offload import Offload
from megatune.parallel.pipeline import Pipeline, stages_of
from megatune.parallel.stages import Stage
from megatune.plan.tracker import META, Tracker, bytes_of
from megatune.training.assemble import Assembled, outline
from megatune.training.layout import check


@dataclass(frozen=True)
class Report:
    """What one process of a layout has and does in a step; sizes in bytes.

    `parameters`: how many it holds (its slices; of sharded ones its shards), `trainable`: of these, trained. `weights`:
    tensors that compute uses; `masters`: those beside them; `gradients`; `optimizer`: moments. `activations`: what
    is alive beside all these when most is: activations of the micro-batches under way, buffers, gathered weights.
    `sent`, `calls`: bytes sent and collectives or messages of the step, by axis. `seconds`: what planning took.
    """

    rank: int
    layout: Layout
    stages: tuple[Stage, ...]
    micro_batches: int
    parameters: int
    trainable: int
    weights: int
    masters: int
    gradients: int
    optimizer: int
    activations: int
    sent: Mapping[str, int]
    calls: Mapping[str, int]
    seconds: float

    @property
    def peak(self) -> int:
        return self.weights + self.masters + self.gradients + self.optimizer + self.activations


def dry_run(config: Config, spec: DecoderSpec, world_size: int, rank: int) -> Report:
    """Run a step of process `rank` of `world_size`. Each sequence is one document, all its tokens are scored.

    Of many micro-batches not all are run: after twice as many as the pipeline has ranks memory does not change
    any more (but under gpipe, which keeps all), and each further one sends the same.
    Raises ParallelError or ConfigError where the model or the batch does not fit the layout, RuntimeError where this
    process belongs to a process group already.
    """
    started = time.perf_counter()
    layout = check(config, spec, world_size)
    count = config.train.global_batch_size // check_batch(config, layout)
    runs = [count]
    if config.parallel.schedule != "gpipe" and count > 2 * layout.pp:
        runs = [layout.pp, 2 * layout.pp]
    with _fake_group(rank, world_size), _shards_on_meta(), _logits_as_on_gpus(), _only_new_objects():
        # Without streams, what runs behind computation would keep its buffers longer here than on a GPU.
        parallel = config.parallel.model_copy(update={"overlap": False})
        world = make_world(parallel, layout, rank, 0, torch.device("cpu"))
        trains = _trained_stages(config, spec)
        batch = _micro_batch(config, world)
        for rope in spec.ropes:
            for long in (False, True):
                inverse_frequencies(rope, long)  # once for all; later, tensors have no values to read
        without_compiling = config.train.model_copy(update={"compile": False})
        built = outline(spec, config.model_copy(update={"train": without_compiling}), world, _dtype(config))
        tracker = Tracker(world)
        with shapes_only(tracker.as_one), tracker:
            process = _Process(config, built, world, trains, tracker)
            batch = _without_values(batch)
            tracker.see(*_tensors(batch))
            steps = [process.step([batch] * number) for number in runs]
    sent, calls = (_continued([step[i] for step in steps], runs, count) for i in (0, 1))
    return Report(
        rank=rank,
        layout=layout,
        stages=process.model.stages,
        micro_batches=count,
        sent=sent,
        calls=calls,
        seconds=time.perf_counter() - started,
        **process.held,
    )


class _Process:
    """The process that is planned for: what a run's rank builds (`training.run`), and its step without the waiting for
    values (the norm of the gradients, and clipping by it)."""

    def __init__(
        self, config: Config, built: Assembled, world: World, trains: Sequence[bool], tracker: Tracker
    ) -> None:
        self.config, self.world, self.tracker = config, world, tracker
        self.model, self.zero = built.model, built.zero
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tracker.leave_out(_local(tensor))  # without memory, which `materialise` gives
        self.zero.materialise(world.device)
        self.optimizer = optim.build(self.zero.masters(), config.optim, world, seed=config.train.seed)
        self.pipeline = Pipeline(self.model, world, dtype=_dtype(config), trains=trains)
        if config.parallel.offload:
            self.model.offloader = Offload(world.device, tracker.leave_out)
        set_balance(self.model, config.moe, config.train.global_batch_size // config.train.micro_batch_size)
        self.zero.publish()
        self.model.train()
        for tensor in self.optimizer.on_host():
            tracker.leave_out(tensor)
        self.held: dict[str, int] = {}
        self.before = tracker.live

    def step(self, batches: Sequence[MicroBatch]) -> tuple[dict[str, int], dict[str, int]]:
        """(bytes sent, collectives) by axis; `held` says what the process has."""
        tracker = self.tracker
        gc.collect()  # what the step before left in cycles
        tracker.start_step()
        self.pipeline.train(batches, 1.0, self.zero.begin_backward)
        self.zero.finish()
        state = self._state()
        self.optimizer.step_with(self.config.optim.lr)
        self.zero.zero_grad()
        self.zero.publish()
        if self.config.moe.bias_rate:
            update_correction(self.model, self.world, self.config.moe.bias_rate)
        local = [_local(p) for p in self.model.parameters()]
        self.held = {
            "parameters": sum(p.numel() for p in local),
            "trainable": sum(_local(p).numel() for p in self.model.parameters() if p.requires_grad),
            **state,
            "activations": tracker.peak - sum(state.values()),
        }
        return dict(tracker.sent), dict(tracker.calls)

    def _state(self) -> dict[str, int]:
        """Bytes of what stays from step to step, each storage counted once: what was there before the first step, and
        gradients that are made anew in each."""
        masters = [master.tensor for master in self.zero.masters().values()]
        grads = [master.grad for master in self.zero.masters().values() if master.grad is not None]
        weights = [_local(p) for p in (*self.model.parameters(), *self.model.buffers())]
        moments = [part for parts in self.optimizer.state().values() for _, part in parts.parts]
        if self.config.parallel.offload_optimizer:
            masters, moments = [], []
        of_weights, of_moments = bytes_of(weights), bytes_of(moments)
        of_masters = bytes_of(weights + masters) - of_weights
        buffers = self.before - of_weights - of_masters - of_moments
        new = [grad for grad in grads if self.tracker.is_new(grad)]
        return {
            "weights": of_weights,
            "masters": of_masters,
            "gradients": buffers + bytes_of(new),
            "optimizer": of_moments,
        }


def _dtype(config: Config) -> torch.dtype:
    return torch.float32 if config.model.dtype == "fp32" else torch.bfloat16


@contextmanager
def _logits_as_on_gpus() -> Iterator[None]:
    """The head's logits in chunks of the size that GPUs have."""
    before = dict(CHUNK_LOGITS)
    CHUNK_LOGITS.clear()
    try:
        yield
    finally:
        CHUNK_LOGITS.update(before)


@contextmanager
def _only_new_objects() -> Iterator[None]:
    """Garbage is looked for among what is made within: a program with much else waits half a second a step else."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _shards_on_meta() -> Iterator[None]:
    """`fully_shard` refuses to run on tensors without memory, a mistake everywhere but here; and what is given memory
    becomes a new tensor, as where it was on meta before and is not then."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with mock.patch.object(FSDPParamGroup, "_validate_no_meta_params", lambda group: None):
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)


@contextmanager
def _fake_group(rank: int, world_size: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("plan: this process is in a process group already; plan in a process of its own")
    # For "meta" too, where messages come in batches.
    with mock.patch.dict(dist.Backend.backend_capability, fake=["cpu", "meta"]):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            yield
        finally:
            dist.destroy_process_group()


def _trained_stages(config: Config, spec: DecoderSpec) -> list[bool]:
    """For each stage of the model whether something in it is trained: what the pipeline's ranks tell each other."""
    stages = stages_of(config.parallel, *stage_costs(spec, config.data.seq_length))
    if config.method.type == "full":
        return [True] * len(stages)
    whole = models.build(spec)
    adapters.attach(whole, config.method)
    trained = [name for name, p in whole.named_parameters() if p.requires_grad]
    modules = [{name.rpartition(".")[0] for name in models.shard_specs(spec, [stage])} for stage in stages]
    return [any(name.startswith(f"{module}.") for name in trained for module in held) for held in modules]


def _micro_batch(config: Config, world: World) -> MicroBatch:
    lengths = (config.data.seq_length,) * config.train.micro_batch_size
    segments = Segments.from_lengths(lengths)
    tokens = torch.zeros(segments.tokens, dtype=torch.int64)
    index = (segments.positions > 0).nonzero().flatten()
    return shard_stream(tokens, segments, Targets(index - 1, tokens[index]), world.cp)


def _without_values(batch: MicroBatch) -> MicroBatch:
    segments, targets = batch.segments, batch.targets
    rows = None if segments.rows is None else segments.rows.to(META)
    positions, borders = segments.positions.to(META), segments.cu_seqlens.to(META)
    return MicroBatch(
        batch.tokens.to(META),
        replace(segments, positions=positions, cu_seqlens=borders, rows=rows),
        Targets(targets.index.to(META), targets.labels.to(META)),
    )


def _tensors(batch: MicroBatch) -> list[Tensor]:
    segments, targets = batch.segments, batch.targets
    rows = [] if segments.rows is None else [segments.rows]
    return [batch.tokens, segments.positions, segments.cu_seqlens, targets.index, targets.labels, *rows]


def _local(parameter: Tensor) -> Tensor:
    return parameter.detach().to_local() if isinstance(parameter, DTensor) else parameter


def _continued(found: Sequence[Mapping[str, int]], runs: Sequence[int], count: int) -> dict[str, int]:
    """Numbers of a step of `count` micro-batches from those of two smaller ones: they grow evenly."""
    if len(runs) == 1:
        return dict(found[0])
    (first, second), (few, many) = found, runs
    return {
        axis: value + (value - first.get(axis, 0)) * (count - many) // (many - few)
        for axis, value in second.items()
    }
