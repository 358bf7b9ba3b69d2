"""A mixture-of-experts layer under expert, tensor and context parallelism equals one process: output, every gradient,
balancing loss, capacity, correction, adapters with dropout; in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatune import parallel
from megatune.config.schema import MoEConfig, ParallelConfig
from megatune.models import moe as models_moe
from megatune.models.moe import MoE, set_balance, take_aux, update_correction
from megatune.models.spec import MoESpec
from megatune.ops import Segments, Targets
from megatune.ops import moe as ops_moe
from megatune.parallel import World, deferred, expert
from megatune.parallel.collectives import gather_rows, sum_
from megatune.parallel.context import shard_stream
from megatune.parallel.expert import GroupedLinear
from megatune.parallel.tensor import own_tokens
from megatune.parallel.world import Axis
from tests.helpers.dist import run_ranks
from tests.helpers.experts import HIDDEN, adapt, fill, spec_of
from tests.helpers.whole import slice_of

TOKENS, PADDING = 48, 5
DEEPSEEK = MoESpec(8, 3, 8, 8, "sigmoid", scale=2.5, groups=4, groups_per_token=2, correction=True)
GPT_OSS = MoESpec(
    8, 2, 8, score="topk_softmax", router_bias=True, expert_bias=True, clamped=True, correction=True
)


@dataclass(frozen=True)
class Case:
    """`idle`: experts from this number on get no token, so that processes receive nothing."""

    layout: dict[str, int] = field(default_factory=dict)
    spec: MoESpec = DEEPSEEK
    balance: MoEConfig = field(default_factory=MoEConfig)
    lora: bool = False
    dropout: float = 0.0
    idle: int = 8
    deferred: bool = False


BALANCED = MoEConfig(aux_loss=0.7, bias_rate=0.01)
CROWDED = MoEConfig(aux_loss=0.7, bias_rate=0.01, capacity=0.8)
TWO = {
    "dp2": Case({"replicate": 2}, lora=True),
    "ep2": Case({"expert": 2}, balance=CROWDED),
    "ep2-oss": Case({"expert": 2}, GPT_OSS, BALANCED, lora=True, dropout=0.3, deferred=True),
    "ep2-idle": Case({"expert": 2}, lora=True, idle=4),
    "tp2": Case({"tensor": 2}, GPT_OSS, CROWDED, lora=True, dropout=0.3),
    "tp2-whole-experts": Case({"tensor": 2, "expert_tensor": 1}, GPT_OSS, BALANCED, lora=True),
    "tp2-ep2": Case({"tensor": 2, "expert_tensor": 1, "expert": 2}, balance=CROWDED, lora=True, dropout=0.3),
    "cp2": Case({"context": 2}, balance=CROWDED),
    "cp2-ep2": Case({"context": 2, "expert": 2}, GPT_OSS, CROWDED, lora=True, dropout=0.3),
}
FOUR = {
    "ep4": Case({"expert": 4}, balance=BALANCED, lora=True),
    "ep4-idle": Case({"expert": 4}, GPT_OSS, CROWDED, idle=3),
    "ep2-replicate2": Case({"expert": 2, "replicate": 2}, balance=BALANCED, lora=True),
    "ep2-tp2": Case({"expert": 2, "tensor": 2}, GPT_OSS, CROWDED, lora=True, dropout=0.3),
    "ep2-tp2-whole": Case({"expert": 2, "tensor": 2, "expert_tensor": 1}, GPT_OSS, BALANCED, lora=True),
    "ep4-tp2-whole": Case(
        {"expert": 4, "tensor": 2, "expert_tensor": 1}, balance=CROWDED, lora=True, dropout=0.3
    ),
    "tp4-etp2-ep2": Case(
        {"tensor": 4, "expert_tensor": 2, "expert": 2}, GPT_OSS, CROWDED, lora=True, dropout=0.3
    ),
    "cp2-tp2-ep2": Case({"context": 2, "tensor": 2, "expert": 2}, balance=CROWDED, lora=True, deferred=True),
    "cp2-ep4": Case({"context": 2, "expert": 4}, balance=CROWDED),
}


def micro_batch(number: int) -> tuple[Tensor, Tensor, Segments]:
    """(x, gradient of the output, segments) of one micro-batch; no two are alike."""
    generator = torch.Generator().manual_seed(100 + number)
    x, grad = torch.randn(2, TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    lengths = (20 + number, TOKENS - PADDING - 20 - number, PADDING)
    return 2 * x, grad, replace(Segments.from_lengths(lengths), padding=PADDING, key=7 + number)


def layer_of(case: Case, world: World) -> tuple[MoE, dict[str, Any]]:
    layer = MoE(spec_of(case.spec), 0, world)
    if case.lora:
        adapt(layer, dropout=case.dropout)
    specs = fill(layer, spec_of(case.spec), world)
    layer.router.correction[case.idle :] -= 100.0
    return layer, specs


def alone(case: Case, micro_batches: int) -> dict[str, Any]:
    """One process that computes all micro-batches, one after the other."""
    layer, _ = layer_of(case, World.alone())
    set_balance(layer, case.balance, micro_batches)
    outputs, inputs = [], []
    for number in range(micro_batches):
        x, grad, segments = micro_batch(number)
        x.requires_grad_()
        y = layer(x, segments)
        y.backward(grad)
        outputs.append(y.detach())
        inputs.append(x.grad)
    found = {"output": outputs, "x": inputs, "aux": take_aux(layer, World.alone())}
    update_correction(layer, World.alone(), 0.01)
    return found | {"grads": {n: p.grad for n, p in layer.named_parameters()}, "router": layer.router}


def compare(case: Case) -> dict[str, float]:
    """{what: largest difference, as a share of the largest value} on this process."""
    config = ParallelConfig(**case.layout, schedule="zb-h1" if case.deferred else "1f1b")
    world = parallel.init(config, device="cpu")
    truth = alone(case, world.dp_size)
    layer, specs = layer_of(case, world)
    set_balance(layer, case.balance, world.dp_size)
    x, grad, segments = micro_batch(world.dp_rank)
    nothing = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    shard = shard_stream(torch.arange(TOKENS), segments, nothing, world.cp)
    mine = own_tokens(shard.tokens, world.tp)
    x = x[mine].requires_grad_()
    y = layer(x, shard.segments)
    if case.deferred:
        with deferred.collecting() as queue:
            y.backward(grad[mine])
        queue.run()
    else:
        y.backward(grad[mine])
    errors = {
        "output": error(y, truth["output"][world.dp_rank][mine]),
        "x": error(x.grad, truth["x"][world.dp_rank][mine]),
    }
    for name, parameter in layer.named_parameters():
        spec, total = specs[name], parameter.grad.clone()
        axes = [world.dp_replicate, world.efsdp if spec.expert else world.fsdp]
        if spec.partial:
            axes.append(world.etp if spec.expert else world.tp)
        for axis in axes:
            total = sum_(total.contiguous(), axis)
        errors[name] = error(total, slice_of(spec, truth["grads"][name], world.cut))
    errors["aux"] = abs(world.sum([take_aux(layer, world)])[0] - truth["aux"])
    update_correction(layer, world, 0.01)
    errors["correction"] = error(layer.router.correction, truth["router"].correction)
    return errors


def error(mine: Tensor, truth: Tensor) -> float:
    assert mine.shape == truth.shape
    return ((mine - truth).abs().max() / truth.abs().max().clamp_min(1e-30)).item()


def on_rank(rank: int, world_size: int, cases: dict[str, Case]) -> dict[str, dict[str, float]]:
    del rank, world_size
    return {name: compare(case) for name, case in cases.items()}


@pytest.mark.parametrize(("world_size", "cases"), [(2, TWO), (4, FOUR)])
def test_layouts_equal_one_process(world_size: int, cases: dict[str, Case]) -> None:
    results = run_ranks(on_rank, world_size, cases)
    wrong = [
        f"{case} rank {rank}: {what} off by {value:.1e}"
        for rank, found in enumerate(results)
        for case, errors in found.items()
        for what, value in errors.items()
        if not value < 1e-10
    ]
    assert not wrong, "\n".join(wrong)


def _gather_without_sum(x: Tensor, axis: Axis) -> Tensor:
    whole = gather_rows(x.detach(), axis)[0]
    mine = slice(axis.rank * x.shape[0], (axis.rank + 1) * x.shape[0])
    return torch.cat((whole[: mine.start], x, whole[mine.stop :]))


# What is wrong: (module, function that is replaced, by what, the case that must see it).
BROKEN: dict[str, tuple[Any, str, Callable[..., Any], Case]] = {
    "loads are of one process's tokens": (models_moe, "sum_", lambda x, axis: x, TWO["cp2"]),
    "rows stay in the senders' order": (ops_moe, "reorder", lambda x, index, inverse: x, TWO["ep2"]),
    "gradients of gathered tokens are not summed": (expert, "gather", _gather_without_sum, TWO["tp2"]),
    "capacity is each process's own": (
        models_moe,
        "gather_rows",
        lambda x, axis: (torch.cat((x, x)) if axis.size > 1 else x, None),
        TWO["tp2"],
    ),
    "every process adds the bias": (
        GroupedLinear,
        "adds_bias",
        property(lambda self: True, lambda self, value: None),
        TWO["tp2"],
    ),
}


def broken_on_rank(rank: int, world_size: int) -> dict[str, float]:
    worst = {}
    for what, (place, name, function, case) in BROKEN.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, function, raising=False)
            worst[what] = max(compare(case).values())
    return worst


def test_what_is_left_out_is_seen() -> None:
    results = run_ranks(broken_on_rank, 2)
    unseen = [what for what in BROKEN if not max(found[what] for found in results) > 1e-4]
    assert not unseen, unseen
