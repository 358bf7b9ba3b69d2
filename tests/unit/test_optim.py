"""Schedules and AdamW against plain formulas and torch."""

import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from megatune import ops
from megatune.config.schema import OptimConfig, ParallelConfig
from megatune.optim import ShardedOptimizer, host, learning_rate, warmup_steps
from megatune.parallel import ShardSpec, World, Zero
from tests.helpers.ops import need_body


def rates(steps=100, **settings):
    config = OptimConfig(lr=1.0, **settings)
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_warmup_is_a_share_below_one_and_steps_from_one_on():
    assert warmup_steps(OptimConfig(warmup=0.03), 100) == 3
    assert warmup_steps(OptimConfig(warmup=0.001), 100) == 1
    assert warmup_steps(OptimConfig(warmup=0.0), 100) == 0
    assert warmup_steps(OptimConfig(warmup=7), 100) == 7


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_schedules_rise_to_the_peak_and_never_rise_again(schedule):
    found = rates(schedule=schedule, warmup=10, min_lr_ratio=0.1)
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(found) == pytest.approx(1.0)
    assert all(a >= b - 1e-12 for a, b in pairwise(found[9:]))
    if schedule == "constant":
        assert set(found[10:]) == {1.0}
    else:
        assert found[-1] < 0.15
        assert min(found[10:]) >= 0.1 - 1e-9


def test_cosine_follows_its_formula():
    found = rates(schedule="cosine", warmup=0.0)
    assert found[25] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.25)))


def test_wsd_is_constant_then_falls_linearly_to_the_floor():
    found = rates(schedule="wsd", warmup=0.0, decay=0.2)
    assert set(found[:81]) == {1.0}
    assert found[-1] == pytest.approx(0.05)
    falls = [a - b for a, b in pairwise(found[80:])]
    assert falls == pytest.approx([falls[0]] * len(falls))


def sharded(
    model: nn.Module,
    specs: dict[str, ShardSpec] | None = None,
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
    device: str = "cpu",
    **settings: object,
) -> tuple[Zero, ShardedOptimizer]:
    """One process's masters of `model` (its values) and their optimizer; `model` trains on, in `dtype`."""
    given = {name: p.detach().clone() for name, p in model.named_parameters()}
    specs = specs or {name: ShardSpec(name, tuple(p.shape)) for name, p in given.items()}
    config = ParallelConfig(zero=0, offload_optimizer=offload)
    world = replace(World.alone(device), config=config)
    zero = Zero(model.to("meta"), specs, world, dtype)
    zero.materialise(device)
    for name, parts in zero.weights().items():
        for box, view in parts.parts:
            view.copy_(box.of(given[name]))
    zero.publish()
    return zero, ShardedOptimizer(zero.masters(), OptimConfig(lr=1e-2, weight_decay=0.1, **settings), world)


def backward(zero: Zero, loss: torch.Tensor) -> None:
    zero.begin_backward(0, True)
    loss.backward()
    zero.finish()


def test_adamw_equals_torch_with_decay_on_matrices_only():
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    theirs = copy.deepcopy(ours)
    zero, optim = sharded(ours)
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    oracle = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2
    )
    for _ in range(5):
        x = torch.randn(4, 5)
        backward(zero, ours(x).square().mean())
        theirs(x).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
        assert math.sqrt(optim.grad_square()) == pytest.approx(norm.item(), rel=1e-6)
        optim.step_with(1e-2, 0.05 / (norm.item() + 1e-6))
        zero.zero_grad()
        oracle.step()
        oracle.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert optim.steps == 5


def test_what_decays_is_decided_by_the_shape_of_one_expert():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 3, 2))
            self.bias = nn.Parameter(torch.ones(4, 3))
            self.matrix = nn.Parameter(torch.ones(4, 3))

    model = Experts()
    specs = {n: ShardSpec(n, tuple(p.shape), expert=n != "matrix") for n, p in model.named_parameters()}
    zero, optim = sharded(model, specs)
    backward(zero, 0.0 * sum(p.sum() for p in model.parameters()))
    optim.step_with(0.5)
    decayed = 1 - 0.5 * 0.1
    for name, p in model.named_parameters():
        assert torch.allclose(p, torch.tensor(1.0 if name == "bias" else decayed)), name


def test_masters_in_line_are_updated_as_one_tensor():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(10)))
    optim = sharded(model)[1]
    assert len(optim._runs) == 2  # with and without decay
    assert sum(len(run.members) for run in optim._runs) == 20


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "lion", "muon"])
def test_the_update_makes_the_weights_too(name, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3))
    specs = {f"layers.{n}": ShardSpec(f"layers.{n}", tuple(p.shape)) for n, p in model.named_parameters()}
    model = nn.ModuleDict({"layers": model})
    zero, optim = sharded(model, specs, torch.bfloat16, name=name)
    for _ in range(2):
        x = torch.randn(4, 64).bfloat16()
        backward(zero, model["layers"](x).square().mean())
        optim.step_with(1e-2)
        zero.zero_grad()
        made = {n: p.detach().clone() for n, p in model.named_parameters()}
        # Only what no update has made is cast when it is published.
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "copy_", None)
            zero.publish()
        for n, p in model.named_parameters():
            master = zero.masters()[n].tensor[: p.numel()].view(p.shape)
            assert torch.equal(made[n], master.bfloat16()) and torch.equal(p, made[n]), n
    for master in zero.masters().values():
        master.tensor.fill_(2.0)
    zero.publish()
    assert all((p == 2).all() for p in model.parameters())


def _offloaded(device: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps with masters on the host, in many chunks, give the bits of three without."""
    monkeypatch.setattr(host, "CHUNK", 1024)
    found = []
    for offload in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(100, 70), nn.Linear(70, 3))
        zero, optim = sharded(model, None, dtype, offload, device, name=name)
        for master in zero.masters().values():
            assert master.tensor.device.type == ("cpu" if offload else device)
        squares = []
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(4, 100, generator=generator).to(device, dtype)
            backward(zero, model(x).square().mean())
            squares.append(optim.grad_square())
            optim.step_with(1e-2, 0.5)
            zero.zero_grad()
            zero.publish()
        parts = [view.cpu() for held in optim.state().values() for _, view in held.parts]
        masters = [master.tensor.cpu() for master in zero.masters().values()]
        weights = [p.detach().cpu() for p in model.parameters()]
        assert bool(optim.on_host()) == offload and all(one.device.type == "cpu" for one in optim.on_host())
        found.append([*weights, *masters, *parts, torch.tensor(squares, dtype=torch.float64)])
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "lion"])
def test_offloaded_masters_are_updated_in_chunks_to_the_same_bits(name, dtype, monkeypatch):
    _offloaded("cpu", name, dtype, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "lion"])
def test_masters_on_the_host_of_a_gpu_are_updated_to_the_bits_of_those_on_it(name, dtype, monkeypatch):
    need_body(name, "cuda", torch.float32, "cuda")
    ops.configure({"adamw": "cuda", "adamw_8bit": "cuda", "lion": "cuda"}, "cuda")
    try:
        _offloaded("cuda", name, dtype, monkeypatch)
    finally:
        ops.configure({}, "cuda")


def test_adamw_state_restores_in_place():
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    zero, optim = sharded(model)
    for _ in range(3):
        backward(zero, model(torch.randn(2, 4)).sum())
        optim.step_with(1e-2)
        zero.zero_grad()
    saved = {k: [view.clone() for _, view in parts.parts] for k, parts in optim.state().items()}
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    assert set(saved) == {
        f"optim/{slot}/{n}" for slot in ("exp_avg", "exp_avg_sq") for n in ("weight", "bias")
    }

    def two_more(target, engine, optimizer):
        torch.manual_seed(1)
        for _ in range(2):
            backward(engine, target(torch.randn(2, 4)).sum())
            optimizer.step_with(1e-2)
            engine.zero_grad()
        return target.weight.detach().clone()

    expected = two_more(model, zero, optim)
    fresh = nn.Linear(4, 4)
    fresh.load_state_dict(weights)
    engine, other = sharded(fresh)
    for key, parts in other.state().items():
        for (_, view), tensor in zip(parts.parts, saved[key], strict=True):
            view.copy_(tensor)
    other.load_steps(3)
    assert torch.equal(two_more(fresh, engine, other), expected)


def test_where_all_is_frozen_nothing_is_counted_or_updated():
    model = nn.Linear(2, 2).requires_grad_(False)
    before = model.weight.clone()
    zero, optim = sharded(model)
    zero.finish()
    assert optim.grad_square() == 0.0
    optim.step_with(1.0)
    assert optim.state() == {} and torch.equal(model.weight, before)
