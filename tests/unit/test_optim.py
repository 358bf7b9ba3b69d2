"""Schedules and AdamW against plain formulas and torch."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from megatune.config.schema import OptimConfig
from megatune.optim import ShardedAdamW, learning_rate, warmup_steps


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


def test_adamw_equals_torch_with_decay_on_matrices_only():
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    theirs = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    theirs.load_state_dict(ours.state_dict())
    optim = ShardedAdamW(ours, OptimConfig(lr=1e-2, weight_decay=0.1))
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    oracle = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2
    )
    for _ in range(5):
        x = torch.randn(4, 5)
        for model in (ours, theirs):
            model(x).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
        assert optim.grad_norm() == pytest.approx(norm.item(), rel=1e-6)
        optim.step_with(1e-2, 0.05 / (norm.item() + 1e-6))
        oracle.step()
        oracle.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert optim.steps == 5


def test_adamw_state_restores_in_place():
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optim = ShardedAdamW(model, OptimConfig())
    for _ in range(3):
        model(torch.randn(2, 4)).sum().backward()
        optim.step_with(1e-2)
    saved = {k: v.clone() for k, v in optim.state().items()}
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    assert set(saved) == {
        f"optim/{slot}/{n}" for slot in ("exp_avg", "exp_avg_sq") for n in ("weight", "bias")
    }

    def two_more(target, optimizer):
        torch.manual_seed(1)
        for _ in range(2):
            target(torch.randn(2, 4)).sum().backward()
            optimizer.step_with(1e-2)
        return target.weight.detach().clone()

    expected = two_more(model, optim)
    fresh = nn.Linear(4, 4)
    fresh.load_state_dict(weights)
    other = ShardedAdamW(fresh, OptimConfig())
    for key, tensor in other.state().items():
        tensor.copy_(saved[key])
    other.load_steps(3)
    assert torch.equal(two_more(fresh, other), expected)


def test_a_model_without_trainable_parameters_is_refused():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable"):
        ShardedAdamW(model, OptimConfig())
