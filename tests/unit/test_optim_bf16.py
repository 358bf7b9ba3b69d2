"""AdamW on bf16 matrices: which element is rounded by what under any layout, and what rounding does to training."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from megatune.config.schema import OptimConfig, ParallelConfig
from megatune.optim import ShardedOptimizer, bf16, master_dtype
from megatune.optim.bf16 import places
from megatune.parallel import Master, ShardSpec, World, Zero
from megatune.parallel.shard import Box, Cut, Fused, local_boxes
from tests.helpers.ops import need_body

QKV = ShardSpec("qkv", (48, 6), 0, Fused((("q", 16), ("k", 4), ("v", 4)), 2))
GATE_UP = ShardSpec("gate_up", (4, 16, 6), 1, Fused((("gate", 1), ("up", 1)), 8), expert=True)
# Two rows of each part are one process's: the pieces lie apart in memory and in the parameter.
APART = ShardSpec("apart", (4, 8, 6), 1, Fused((("a", 4), ("b", 4)), 1), expert=True)
DOWN = ShardSpec("down", (4, 6, 16), 2, expert=True)
CUTS = [
    (ShardSpec("matrix", (10, 12)), Cut()),
    (ShardSpec("rows", (10, 12), 0), Cut(tp=(1, 2))),
    (ShardSpec("columns", (10, 12), 1), Cut(tp=(2, 3))),
    (QKV, Cut(tp=(1, 2))),
    (QKV, Cut(tp=(3, 4))),
    (GATE_UP, Cut(ep=(1, 2), etp=(1, 2))),
    (APART, Cut(ep=(1, 2), etp=(1, 2))),
    (DOWN, Cut(ep=(1, 2), etp=(3, 4))),
]


def numbered(spec: ShardSpec, cut: Cut) -> Tensor:
    """A process's local tensor, of which each element is its place in the parameter."""
    whole = torch.arange(math.prod(spec.shape)).view(spec.shape)
    return torch.cat([box.of(whole) for box in local_boxes(spec, cut)], spec.tensor_dim or 0)


def check_places(master: Master) -> int:
    """Every element of the master is in one place, which says where in the parameter it stands."""
    flat = master.tensor.view(-1)
    seen = torch.zeros_like(flat)
    found = places(master, 5, flat.storage_offset())
    for place in found:
        at = torch.arange(place.numel)
        here = flat[place.start : place.start + place.numel]
        assert torch.equal(here, place.first + at // place.width * place.stride + at % place.width)
        seen[place.start : place.start + place.numel] += 1
        assert place.key == 5
    assert torch.equal(seen, (flat >= 0).long())
    return len(found)


@pytest.mark.parametrize(("spec", "cut"), CUTS, ids=[f"{spec.name}-{cut}" for spec, cut in CUTS])
def test_each_shard_knows_which_elements_it_has(spec: ShardSpec, cut: Cut) -> None:
    local = numbered(spec, cut)
    most = check_places(Master("w", spec, local.reshape(-1).clone(), None, True, cut))
    assert most == {"qkv": len(local_boxes(spec, cut)), "apart": 4}.get(spec.name, 1)
    # Chunks of ZeRO 1, the last one padded; boxes of ZeRO 3 by rows and, of experts, by their rows.
    for shards in (2, 3, 5):
        chunk = -(-local.numel() // shards)
        padded = torch.cat([local.reshape(-1), torch.full((shards * chunk - local.numel(),), -1)])
        for rank in range(shards):
            mine = padded[rank * chunk : (rank + 1) * chunk].clone()
            check_places(Master("w", spec, mine, None, True, cut, start=rank * chunk))
    for dim in range(local.ndim - 1):
        for start in range(local.shape[dim] - 1):
            offset, shape = [0] * local.ndim, list(local.shape)
            offset[dim], shape[dim] = start, 2
            at = Box(tuple(offset), tuple(shape))
            check_places(Master("w", spec, at.of(local).contiguous(), None, True, cut, at=at))


def test_many_rows_are_as_few_elements_as_the_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16, "MOST_OF_ROWS", 24)
    spec, cut = CUTS[-1]
    assert check_places(Master("w", spec, numbered(spec, cut).reshape(-1), None, True, cut)) == 12
    assert check_places(Master("w", CUTS[0][0], numbered(*CUTS[0]).reshape(-1), None, True, Cut())) == 1


def test_a_bucket_and_a_shard_of_it_are_few_pieces() -> None:
    """As many as there are matrices: what is cut in the middle of a row is one run of the parameter."""
    spec = ShardSpec("w", (64, 24))
    assert check_places(Master("w", spec, torch.arange(100, 900), None, True, Cut(), start=100)) == 1
    columns = ShardSpec("w", (64, 24), 1)
    local = numbered(columns, Cut(tp=(1, 2))).reshape(-1)
    assert (
        check_places(Master("w", columns, local[100:700].clone(), None, True, Cut(tp=(1, 2)), start=100)) == 3
    )


def built(
    model: nn.Module, seed: int = 0, device: str = "cpu", **settings: object
) -> tuple[Zero, ShardedOptimizer]:
    given = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = OptimConfig(weight_decay=0.0, **settings)
    world = replace(World.alone(device), config=ParallelConfig(zero=0))
    specs = {name: ShardSpec(name, tuple(p.shape)) for name, p in given.items()}
    zero = Zero(model.to("meta"), specs, world, torch.bfloat16, master_dtype(config, torch.bfloat16))
    zero.materialise(device)
    for name, parts in zero.weights().items():
        parts.parts[0][1].copy_(given[name])
    zero.publish()
    return zero, ShardedOptimizer(zero.masters(), config, world, seed)


def regression(
    name: str, *, nearest: bool = False, seed: int = 0, steps: int = 120, device: str = "cpu"
) -> list[float]:
    """Losses of a linear layer that learns another one beside it, in steps far below bf16's spacing of its weights.
    `nearest`: masters are rounded to bf16 after each step."""
    torch.manual_seed(0)
    model = nn.Linear(32, 32)
    with torch.no_grad():
        model.weight.uniform_(0.5, 1.0).mul_(torch.randn(32, 32).sign())
        model.weight.copy_(model.weight.bfloat16())
    teacher = (model.weight.detach() + 0.05 * torch.randn(32, 32).sign()).to(device)
    zero, optim = built(model, seed, device, name=name)
    losses = []
    for _ in range(steps):
        x = torch.randn(64, 32).to(device)
        loss = (model(x.bfloat16()).float() - x @ teacher.t()).square().mean()
        losses.append(loss.item())
        zero.begin_backward(0, True)
        loss.backward()
        zero.finish()
        optim.step_with(5e-4)  # half of the spacing is 2e-3
        zero.zero_grad()
        if nearest:
            for master in zero.masters().values():
                master.tensor.copy_(master.tensor.bfloat16())
        zero.publish()
    return losses


def test_training_goes_as_with_fp32_masters_and_not_as_with_rounding_to_nearest() -> None:
    runs = (regression("adamw"), regression("adamw_bf16"), regression("adamw", nearest=True))
    start = runs[0][0]
    masters, low, nearest = (sum(losses[-20:]) / 20 for losses in runs)
    # Seen: 0.087, then 0.0111, 0.0135 and 0.0848.
    assert masters < 0.15 * start
    assert low < 1.35 * masters
    assert nearest > 0.9 * start


def test_the_weights_are_the_masters_and_vectors_keep_fp32_ones() -> None:
    zero, optim = built(nn.Linear(40, 40), name="adamw_bf16")
    weight, bias = (zero.masters()[name].tensor for name in ("weight", "bias"))
    assert (weight.dtype, bias.dtype) == (torch.bfloat16, torch.float32)
    held = dict(zero._model.named_parameters())
    assert held["weight"].data_ptr() == weight.data_ptr() and held["bias"].dtype == torch.bfloat16
    moments = [view for parts in optim.state().values() for _, view in parts.parts]
    assert len(moments) == 4 and {one.dtype for one in moments} == {torch.float32}
    first, same, other = (regression("adamw_bf16", seed=seed, steps=5) for seed in (1, 1, 2))
    assert first == same != other


@pytest.mark.gpu
def test_on_a_gpu_it_trains_as_on_a_cpu_in_14_bytes_a_parameter() -> None:
    need_body("adamw_bf16", "cuda", torch.bfloat16, "cuda")
    here, there = (regression("adamw_bf16", device=device) for device in ("cpu", "cuda"))
    assert there == pytest.approx(here, rel=0.05)
    before = torch.cuda.memory_allocated()
    held = built(nn.Linear(4096, 4096, bias=False), device="cuda", name="adamw_bf16")
    assert (torch.cuda.memory_allocated() - before) / 4096**2 == pytest.approx(14, abs=0.01)
    del held
