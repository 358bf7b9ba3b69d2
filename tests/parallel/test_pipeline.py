"""The pipeline engine equals one process: losses, gradients, evaluation, logits; torch's own pipelines as oracle."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatune import parallel
from megatune.config.schema import ParallelConfig
from megatune.models import Decoder
from megatune.models.cache import KVCache
from megatune.models.spec import DecoderSpec, LayerSpec, RopeSpec
from megatune.ops import Segments, Targets
from megatune.parallel import deferred
from megatune.parallel.context import MicroBatch
from megatune.parallel.pipeline import Pipeline, balance, held, stages_of, virtual_of
from megatune.parallel.stages import Stage
from megatune.parallel.tensor import Linear
from megatune.parallel.world import World
from tests.helpers.dist import RankError, run_ranks

LAYERS, VOCAB = 6, 61
COSTS = ([1.0] * LAYERS, 0.1, 0.5)
SCALE = 0.37
# Documents of each micro-batch: packed, padded to nothing, all of another length.
LENGTHS = ((5, 9), (16,), (3, 3, 4), (11, 1), (2, 17, 4), (7,), (1, 1, 20), (13, 8))


@dataclass(frozen=True)
class Case:
    schedule: str
    micro_batches: int
    virtual: int | None = None
    stages: tuple[int, ...] | None = None
    tied: bool = False
    # First layer that is trained; above 0 the embedding is frozen too, and the layers' norms.
    train_from: int = 0
    recompute: str = "none"

    def config(self, pp: int) -> ParallelConfig:
        stages = None if self.stages is None else list(self.stages)
        count = pp * (self.virtual or (2 if self.schedule in ("interleaved", "zbv") else 1))
        if stages is None and count > LAYERS:  # empty stages have to be named
            stages = balance(*COSTS, count)
        return ParallelConfig(
            pipeline=pp, schedule=self.schedule, virtual=self.virtual, stages=stages, zero=0
        )


def spec_of(tied: bool) -> DecoderSpec:
    return DecoderSpec(
        family="llama",
        vocab_size=VOCAB,
        hidden_size=32,
        mlp_size=40,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        layers=tuple(LayerSpec() for _ in range(LAYERS)),
        ropes=(RopeSpec(10000.0, 8),),
        max_positions=64,
        attention_scale=8**-0.5,
        tied_embeddings=tied,
    )


def whole_model(tied: bool) -> Decoder:
    """All stages in one process, fp64, the same weights in every process."""
    model = Decoder(spec_of(tied)).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.2 * noise + (1.0 if "norm" in name else 0.0))
    return model


def micro_batches(count: int) -> list[MicroBatch]:
    batches = []
    for index in range(count):
        lengths = LENGTHS[index % len(LENGTHS)]
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, VOCAB, (sum(lengths),), generator=generator)
        segments = Segments.from_lengths(lengths)
        scored = (segments.positions[1:] > 0).nonzero().flatten()
        batches.append(MicroBatch(tokens, segments, Targets(scored, tokens[scored + 1])))
    return batches


def freeze(model: Decoder, train_from: int) -> None:
    """As LoRA or freezing do: the beginning has nothing to train, later stages a part of their weights."""
    for name, parameter in model.named_parameters():
        if train_from and name.startswith("layers."):
            parameter.requires_grad_(int(name.split(".")[1]) >= train_from and "norm" not in name)
        elif name == "embed.weight":
            parameter.requires_grad_(not train_from)


def reference(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one process, by plain accumulation."""
    model = whole_model(case.tied)
    freeze(model, case.train_from)
    total = torch.zeros((), dtype=torch.float64)
    for batch in micro_batches(case.micro_batches):
        loss = model(batch.tokens, batch.segments, batch.targets) * SCALE
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def stage_model(case: Case, world: World) -> Decoder:
    """This rank's stages with the weights of `whole_model`."""
    spec, config = spec_of(case.tied), world.config
    stages = stages_of(config, *COSTS)
    mine = [stages[n] for n in held(config.schedule, world.pp.size, world.pp.rank, virtual_of(config))]
    model = Decoder(spec, world, mine).double()
    values = dict(whole_model(case.tied).named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    freeze(model, case.train_from)
    model.recompute = case.recompute
    return model


class Calls:
    """Counts `begin_backward` and weight gradients that came by `deferred`."""

    def __init__(self, model: Decoder) -> None:
        self.begun: list[tuple[int, bool]] = []
        self.put_off = 0
        for parameter in model.parameters():
            parameter.grad_ready = self.ready

    def begin(self, stage: int, is_last: bool) -> None:
        assert not deferred.active()
        self.begun.append((stage, is_last))

    def ready(self, _: nn.Parameter) -> None:
        self.put_off += 1


def near(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12, msg=lambda text: f"{what}: {text}")


def check_case(case: Case, world: World) -> None:
    world = replace(world, config=case.config(world.pp.size))
    model = stage_model(case, world)
    pipeline = Pipeline(model, world, dtype=torch.float64)
    # A stage wants the gradient of its input where something before it is trained.
    stages = stages_of(world.config, *COSTS)
    starts = [stage.layers.start for stage in stages]
    assert pipeline.traffic.wanted[1:] == tuple(
        n > case.train_from or not case.train_from for n in starts[1:]
    )
    batches = micro_batches(case.micro_batches)
    expected_loss, expected = reference(case)
    calls = Calls(model)
    for _ in range(2):  # gradients add up, and nothing is left over from the step before
        loss = pipeline.train(batches, SCALE, calls.begin)
        losses = loss.clone()
        dist.all_reduce(losses, group=world.pp.group)
        near(losses, expected_loss, f"{case} loss")
        assert bool(loss) == model.stages[-1].is_last
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if case.tied and "embed.weight" in expected:
        sum_tied(model, grads, world)
    local = dict(model.named_parameters())
    for name, grad in expected.items():
        if name in local:
            near(grads[name], 2 * grad, f"{case} {name}")
    assert grads.keys() == expected.keys() & local.keys()
    count, stages = case.micro_batches, range(len(model.stages))
    assert sorted(calls.begun) == sorted(2 * [(s, n == count - 1) for s in stages for n in range(count)])
    halves = (case.schedule == "zb-h1" and world.pp.rank > 0) or case.schedule == "zbv"
    has_trained = any("layers." in name for name, p in local.items() if p.requires_grad)
    assert bool(calls.put_off) == (halves and has_trained), (case, calls.put_off)
    check_forward(case, pipeline, batches, world)


def check_forward(case: Case, pipeline: Pipeline, batches: Sequence[MicroBatch], world: World) -> None:
    """Evaluation of any number of micro-batches, and logits with a cache."""
    whole = whole_model(case.tied)
    batches = [*batches, *micro_batches(3)]
    with torch.no_grad():
        expected = sum(whole(batch.tokens, batch.segments, batch.targets).double() for batch in batches)
    found = pipeline.evaluate(batches)
    assert not found.requires_grad and bool(found) == pipeline.stages[-1].is_last
    dist.all_reduce(found, group=world.pp.group)
    near(found, expected, f"{case} evaluation")
    cache, whole_cache = KVCache(16), KVCache(16)
    for ids in ([5, 9, 11, 3], [8], [1]):
        tokens, segments = torch.tensor(ids), Segments.from_lengths((len(ids),))
        with torch.no_grad():
            logits = whole(tokens, segments, cache=whole_cache)
        found = pipeline.logits(tokens, segments, cache)
        near(found, logits[-1:], f"{case} logits")


def sum_tied(model: Decoder, grads: dict[str, Tensor], world: World) -> None:
    """First and last stage have a copy each: their gradients belong together."""
    mine = grads.get("embed.weight", torch.zeros(VOCAB, 32, dtype=torch.float64))
    total = mine.clone()
    dist.all_reduce(total, group=world.pp.group)
    if "embed.weight" in grads:
        grads["embed.weight"] = total


def run_cases(rank: int, size: int, cases: Sequence[Case]) -> None:
    world = parallel.init(ParallelConfig(pipeline=size, zero=0), device="cpu")
    for case in cases:
        check_case(case, world)


TWO = [
    Case("gpipe", 4),
    Case("gpipe", 1, tied=True),
    Case("1f1b", 8),
    Case("1f1b", 5, stages=(5, 1), tied=True),
    Case("1f1b", 4, stages=(0, 6)),
    Case("1f1b", 4, stages=(6, 0), tied=True),
    Case("1f1b", 4, train_from=4),
    Case("1f1b", 3, recompute="full"),
    Case("1f1b", 2, train_from=6, stages=(3, 3)),
    Case("interleaved", 4, tied=True),
    Case("interleaved", 6, virtual=3),
    Case("interleaved", 4, stages=(2, 0, 3, 1), train_from=2),
    Case("zb-h1", 8, tied=True),
    Case("zb-h1", 1),
    Case("zb-h1", 4, train_from=2, stages=(4, 2)),
    Case("zb-h1", 4, recompute="full"),
    Case("zbv", 8, tied=True),
    Case("zbv", 4, stages=(1, 0, 3, 2)),
    Case("zbv", 4, stages=(1, 2, 3, 0), train_from=3),
    Case("zbv", 2),
]
FOUR = [
    Case("gpipe", 4, tied=True),
    Case("1f1b", 8),
    Case("1f1b", 2, stages=(3, 0, 2, 1), tied=True),
    Case("1f1b", 6, train_from=4),
    Case("interleaved", 8, tied=True),
    Case("zb-h1", 7),
    Case("zbv", 8, tied=True),
    Case("zbv", 3, train_from=3),
]


def test_two_ranks() -> None:
    run_ranks(run_cases, 2, TWO)


def test_four_ranks() -> None:
    run_ranks(run_cases, 4, FOUR)


# torch.distributed.pipelining computes the same.

TOY_STAGES, TOY_SIZE, TOY_ROWS, TOY_BATCHES = 4, 12, 6, 6


class Block(nn.Module):
    """One stage's layer: our linear, whose weight gradient can be put off, or torch's."""

    def __init__(self, number: int, world: World | None) -> None:
        super().__init__()
        if world is None:
            self.linear = nn.Linear(TOY_SIZE, TOY_SIZE, dtype=torch.float64)
        else:
            self.linear = Linear(TOY_SIZE, TOY_SIZE, bias=True, shard="column", world=world).double()
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(TOY_SIZE, TOY_SIZE, generator=generator) * 0.4)
            self.linear.bias.copy_(torch.randn(TOY_SIZE, generator=generator) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Toy(nn.Module):
    """A stack of blocks, one or more a stage, called as a Decoder is."""

    def __init__(self, stages: Sequence[Stage], world: World) -> None:
        super().__init__()
        self.stages = tuple(stages)
        self.spec = SimpleNamespace(hidden_size=TOY_SIZE, tied_embeddings=False)
        held = [number for stage in stages for number in stage.layers]
        self.layers = nn.ModuleDict({str(number): Block(number, world) for number in held})

    def forward(self, x: Tensor, segments: Segments, targets: Any = None, stage: int = 0) -> Tensor:
        part = self.stages[stage]
        for number in part.layers:
            x = self.layers[str(number)](x)
        return toy_loss(x, targets) if part.is_last else x


def toy_loss(x: Tensor, targets: Tensor) -> Tensor:
    return (x - targets).square().sum()


def oracle(name: str, world: World, x: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of all micro-batches (0 without the last stage) and gradients by torch.distributed.pipelining."""
    from torch.distributed import pipelining

    per_rank = 1 if name in ("gpipe", "1f1b", "zb-h1") else 2
    numbers = held(name, world.pp.size, world.pp.rank, per_rank)
    count, each = world.pp.size * per_rank, TOY_STAGES // (world.pp.size * per_rank)
    parts = [nn.Sequential(*(Block(n * each + i, None) for i in range(each))) for n in numbers]
    device = torch.device("cpu")
    stages = [
        pipelining.PipelineStage(part, number, count, device, group=world.pp.group)
        for part, number in zip(parts, numbers, strict=True)
    ]
    kind = {
        "gpipe": pipelining.ScheduleGPipe,
        "1f1b": pipelining.Schedule1F1B,
        "interleaved": pipelining.ScheduleInterleaved1F1B,
        "zbv": pipelining.ScheduleZBVZeroBubble,
    }[name]
    plan = kind(stages[0] if per_rank == 1 else stages, TOY_BATCHES, loss_fn=toy_loss, scale_grads=False)
    losses: list[Tensor] = []
    given = {"target": targets, "losses": losses} if count - 1 in numbers else {}
    plan.step(*([x] if 0 in numbers else []), **given)
    grads = {
        f"layers.{number * each + i}.linear.{kind}": parameter.grad
        for part, number in zip(parts, numbers, strict=True)
        for i, block in enumerate(part)
        for kind, parameter in block.linear.named_parameters()
    }
    return torch.stack(losses).sum() if losses else torch.zeros(()), grads


def against_torch(rank: int, size: int, names: Sequence[str]) -> None:
    first = parallel.init(ParallelConfig(pipeline=size, zero=0), device="cpu")
    generator = torch.Generator().manual_seed(0)
    shape = (TOY_ROWS * TOY_BATCHES, TOY_SIZE)
    x, targets = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    segments = Segments.from_lengths((TOY_ROWS,))
    batches = [
        MicroBatch(one, segments, other)
        for one, other in zip(x.chunk(TOY_BATCHES), targets.chunk(TOY_BATCHES), strict=True)
    ]
    for name in names:
        config = ParallelConfig(pipeline=size, schedule=name, zero=0)
        world = replace(first, config=config)
        stages = stages_of(config, [1.0] * TOY_STAGES, 0.0, 0.0)
        mine = [stages[number] for number in held(name, size, rank, virtual_of(config))]
        model = Toy(mine, world)
        loss = Pipeline(model, world, dtype=torch.float64).train(batches, 1.0, lambda stage, last: None)
        # Theirs computes a gradient for the first input, ours need not: the same numbers come out.
        expected_loss, expected = oracle(name, world, x, targets)
        near(loss, expected_loss.double(), f"{name} loss")
        assert expected.keys() == dict(model.named_parameters()).keys()
        for key, parameter in model.named_parameters():
            near(parameter.grad, expected[key], f"{name} {key}")


def test_equals_torch_pipelining() -> None:
    names = ["gpipe", "1f1b", "interleaved"]
    if torch.__version__ >= "2.13":
        names.append("zbv")  # over gloo a V does not start before
    run_ranks(against_torch, 2, names)


class Saved:
    """A tensor that autograd keeps for backward; `alive` are those that it still keeps."""

    alive: ClassVar[weakref.WeakSet[Saved]] = weakref.WeakSet()
    most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        Saved.alive.add(self)
        Saved.most = max(Saved.most, len(Saved.alive))


def frees(rank: int, size: int) -> None:
    first = parallel.init(ParallelConfig(pipeline=size, zero=0), device="cpu")
    segments = Segments.from_lengths((TOY_ROWS,))
    x = torch.ones(TOY_ROWS, TOY_SIZE, dtype=torch.float64)
    peaks = {}
    for name, micro_batches in (("gpipe", 1), ("gpipe", 8), ("1f1b", 8)):
        world = replace(first, config=ParallelConfig(pipeline=size, schedule=name, zero=0))
        model = Toy([stages_of(world.config, [1.0] * TOY_STAGES, 0.0, 0.0)[rank]], world)
        pipeline = Pipeline(model, world, dtype=torch.float64)
        Saved.most = 0
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            pipeline.train([MicroBatch(x, segments, x)] * micro_batches, 1.0, lambda stage, last: None)
        assert not Saved.alive
        peaks[name, micro_batches] = Saved.most
    one = peaks["gpipe", 1]
    assert one > 0 and peaks["gpipe", 8] == 8 * one and peaks["1f1b", 8] == (size - rank) * one


def test_activations_are_freed_by_their_backward() -> None:
    run_ranks(frees, 2)


# What happens when something is wrong.


def fails_on_last(rank: int, size: int) -> None:
    world = parallel.init(ParallelConfig(pipeline=size, zero=0), device="cpu")
    model = stage_model(Case("1f1b", 4), world)
    pipeline = Pipeline(model, world, dtype=torch.float64)
    if model.stages[-1].is_last:
        model.norm.forward = lambda x: 1 / 0
    pipeline.train(micro_batches(4), 1.0, lambda stage, last: None)


def test_an_error_on_one_rank_is_raised_there() -> None:
    with pytest.raises(RankError, match="ZeroDivisionError"):
        run_ranks(fails_on_last, 2, timeout=60)


def misuses(rank: int, size: int) -> None:
    world = parallel.init(ParallelConfig(pipeline=size, zero=0), device="cpu")
    model = stage_model(Case("1f1b", 4), world)
    wrong = replace(world, config=ParallelConfig(pipeline=size, schedule="zbv", zero=0))
    with pytest.raises(ValueError, match=r"the model has stages .* of 2; pipeline rank . of 2 .*zbv has"):
        Pipeline(model, wrong, dtype=torch.float64)
    pipeline = Pipeline(model, world, dtype=torch.bfloat16)
    if rank == 0:
        with pytest.raises(TypeError, match=r"gave torch.float64, the pipeline was made for torch.bfloat16"):
            pipeline.train(micro_batches(1), 1.0, lambda stage, last: None)


def test_misuse_is_told() -> None:
    run_ranks(misuses, 2)


def test_one_rank_is_a_plain_loop() -> None:
    case = Case("1f1b", 4)
    model = whole_model(False)
    pipeline = Pipeline(model, World.alone(), dtype=torch.float64)
    begun: list[tuple[int, bool]] = []
    batches = micro_batches(4)
    loss = pipeline.train(batches, SCALE, lambda stage, last: begun.append((stage, last)))
    expected_loss, expected = reference(case)
    near(loss, expected_loss, "loss")
    for name, parameter in model.named_parameters():
        near(parameter.grad, expected[name], name)
    assert begun == [(0, False)] * 3 + [(0, True)]
    near(pipeline.evaluate(batches) * SCALE, expected_loss, "evaluation")
    logits = pipeline.logits(batches[0].tokens, batches[0].segments)
    near(logits, model(batches[0].tokens, batches[0].segments)[-1:].detach(), "logits")
