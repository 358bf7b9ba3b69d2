"""The mixture-of-experts layer on one process: routing, products by group, capacity, balancing, adapters."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from megatune.config.schema import MoEConfig
from megatune.models.moe import MoE, set_balance, take_aux, update_correction
from megatune.models.spec import MoESpec
from megatune.ops import OPS, Segments, clamped_glu, moe
from megatune.ops.moe import Groups
from megatune.parallel import World
from tests.helpers.experts import HIDDEN, adapt, by_hand, fill, spec_of

PLAIN = MoESpec(6, 2, 5)
SPECS = {
    "softmax": PLAIN,
    "softmax-raw": replace(PLAIN, normalise=False, scale=1.5, correction=True),
    "sigmoid-groups": MoESpec(
        8, 3, 5, 4, "sigmoid", scale=2.5, groups=4, groups_per_token=2, correction=True
    ),
    "topk-softmax": replace(PLAIN, score="topk_softmax", router_bias=True, expert_bias=True, clamped=True),
}


def layer_of(moe: MoESpec, seed: int = 0) -> MoE:
    layer = MoE(spec_of(moe), 0)
    fill(layer, spec_of(moe), World.alone(), seed)
    return layer


def tokens(count: int = 20, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64).mul_(2).requires_grad_()


def stream(total: int, padding: int = 0, key: int = 0) -> Segments:
    lengths = (total - padding, padding) if padding else (total,)
    return replace(Segments.from_lengths(lengths), padding=padding, key=key)


def route_by_hand(layer: MoE, x: Tensor) -> tuple[list[list[int]], Tensor]:
    """(experts, weights) of each token, by the formulas of the papers."""
    spec, router = layer.spec, layer.router
    chosen, weights = [], []
    for token in x:
        logits = router.weight @ token + (0 if router.bias is None else router.bias)
        scores = {"softmax": logits.exp() / logits.exp().sum(), "sigmoid": 1 / (1 + (-logits).exp())}.get(
            spec.score, logits
        )
        order = (scores if router.correction is None else scores + router.correction).tolist()
        size = spec.num_experts // spec.groups
        groups = [sorted(order[g * size : (g + 1) * size])[::-1] for g in range(spec.groups)]
        best = sorted(range(spec.groups), key=lambda g: -sum(groups[g][:2]))[: spec.groups_per_token]
        allowed = [e for e in range(spec.num_experts) if e // size in best]
        mine = sorted(allowed, key=lambda e: -order[e])[: spec.top_k]
        weight = scores[mine]
        if spec.score == "topk_softmax":
            weight = weight.exp() / weight.exp().sum()
        elif spec.normalise:
            weight = weight / weight.sum()
        chosen.append(mine)
        weights.append(weight * spec.scale)
    return chosen, torch.stack(weights)


@pytest.mark.parametrize("kind", SPECS)
def test_the_layer_is_its_formula(kind: str) -> None:
    layer, x = layer_of(SPECS[kind]), tokens()
    y = layer(x, stream(20))
    grad = tokens(seed=2).detach()
    inputs = [x, *layer.parameters()]
    found = torch.autograd.grad(y, inputs, grad)
    experts, weights = route_by_hand(layer, x)
    assert len({tuple(sorted(chosen)) for chosen in experts}) > 3, "the routing is too even to show anything"
    expected = by_hand(layer, x, torch.tensor(experts), weights)
    torch.testing.assert_close(y, expected)
    for mine, truth in zip(found, torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(mine, truth)


def test_router_computes_in_fp32_from_low_precision() -> None:
    layer = layer_of(PLAIN)
    layer.bfloat16()
    x = tokens(64).detach().bfloat16().requires_grad_()
    choice = layer.router(x)
    assert choice.weights.dtype == choice.probabilities.dtype == torch.float32
    exact = (x.double() @ layer.router.weight.double().t()).softmax(1)
    assert (choice.probabilities - exact).abs().max() < 1e-6  # bf16 logits would be off by 1e-2
    choice.probabilities.square().sum().backward()
    assert x.grad.dtype == layer.router.weight.grad.dtype == torch.bfloat16


def grouped(body: str, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, groups: Groups) -> list[Tensor]:
    forward, input_grad, weight_grad, total = OPS["grouped_linear"].bodies[body].run
    return [
        forward(x, weight, bias, groups),
        input_grad(grad, weight, groups),
        weight_grad(grad, x, groups),
        total(grad, groups),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [(3, 0, 6, 1), (0, 0, 5, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("body", ["reference", "grouped_mm"])
def test_products_by_group(body: str, counts: tuple[int, ...], dtype: torch.dtype) -> None:
    """Each expert's rows by themselves; both bodies, experts without rows among them."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = sum(counts)
    x, weight, bias, grad = draw(rows, 16), draw(4, 24, 16), draw(4, 24), draw(rows, 24)
    groups = Groups(torch.tensor(counts), rows)
    expected = [[], [], [], []]
    pieces = (*(t.double().split(counts) for t in (x, grad)), weight.double(), bias.double())
    for px, pg, w, b in zip(*pieces, strict=True):
        for found, one in zip(expected, (px @ w.t() + b, pg @ w, pg.t() @ px, pg.sum(0)), strict=True):
            found.append(one)
    join = (torch.cat, torch.cat, torch.stack, torch.stack)
    for found, parts, how in zip(grouped(body, x, weight, bias, grad, groups), expected, join, strict=True):
        assert found.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found.double(), how(parts), rtol=tolerance, atol=10 * tolerance)


def test_sorted_weighted_and_back() -> None:
    """Dropped choices and tokens without any are as if they were not there; gradients by finite differences."""
    experts = torch.tensor([[2, 0], [4, 2], [4, 4], [1, 2]])  # 4: dropped
    x = tokens(4).detach()[:, :3].contiguous().requires_grad_()
    weights = torch.rand(
        4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    order = moe.sort_by_expert(experts, 4, drops=True)
    assert order.groups.sizes == (1, 1, 3, 0) and order.tokens.tolist() == [0, 3, 0, 1, 3]

    def function(x: Tensor, weights: Tensor) -> Tensor:
        return moe.combine(moe.permute(x, order) ** 2, weights, order)

    kept = (weights * (experts < 4)).sum(1, keepdim=True)
    torch.testing.assert_close(function(x, weights), kept * x**2)
    assert torch.autograd.gradcheck(function, (x, weights))


def test_no_tokens() -> None:
    layer, x = layer_of(SPECS["sigmoid-groups"]), tokens(0)
    y = layer(x, Segments.from_lengths(()))
    assert y.shape == (0, HIDDEN)
    y.sum().backward()
    assert all(not p.grad.any() for p in layer.parameters())


def test_clamped_gate() -> None:
    pairs = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 8
    pairs.requires_grad_()
    assert (pairs.abs() > 7).any()
    assert torch.autograd.gradcheck(clamped_glu, (pairs,))
    with pytest.raises(ValueError, match="must be"):
        clamped_glu(pairs[:, :5])


@pytest.mark.parametrize("padding", [0, 6])
def test_capacity_keeps_the_first_of_the_stream(padding: int) -> None:
    layer, x = layer_of(PLAIN), tokens(24)
    set_balance(layer, MoEConfig(capacity=0.75), 1)
    segments = stream(24, padding)
    choice = layer.router(x)
    most, taken, experts = math.ceil(0.75 * (24 - padding) * 2 / 6), [0] * 6, choice.experts.clone()
    for token in range(24 - padding):
        for place, expert in enumerate(choice.experts[token].tolist()):
            taken[expert] += 1
            if taken[expert] > most:
                experts[token, place] = 6
    assert 0 < (experts == 6).sum() < 24
    torch.testing.assert_close(layer(x, segments), by_hand(layer, x, experts, choice.weights))
    layer.eval()
    torch.testing.assert_close(layer(x, segments), by_hand(layer, x, choice.experts, choice.weights))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid-groups", "topk-softmax"])
@pytest.mark.parametrize("again", [False, True])
def test_balancing_loss_is_that_of_transformers(kind: str, again: bool) -> None:
    """Its value and its gradient on top of the loss's, whatever the loss is scaled by; also where the layer is computed
    twice. Padding does not count, nor does evaluation."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layer, x, spec = layer_of(SPECS[kind]), tokens(24), SPECS[kind]
    segments, grad = stream(24, padding=5), 1e-3 * tokens(24, seed=2).detach()
    inputs = [x, *layer.parameters()]
    plain = torch.autograd.grad(layer(x, segments), inputs, grad)
    set_balance(layer, MoEConfig(aux_loss=0.3), 4)
    y = checkpoint(layer, x, segments, use_reentrant=False) if again else layer(x, segments)
    found = torch.autograd.grad(y, inputs, grad)
    value = take_aux(layer, World.alone())

    choice = layer.router(x)
    if spec.score == "sigmoid":
        counts = torch.bincount(choice.experts[:19].flatten(), minlength=8) / 19
        loss = 8 * (counts * choice.probabilities[:19].mean(0)).sum()
    else:
        logits = x @ layer.router.weight.t() + (0 if layer.router.bias is None else layer.router.bias)
        mask = (torch.arange(24) < 19)[None]
        loss = load_balancing_loss_func((logits,), spec.num_experts, spec.top_k, mask)
    loss = loss * 0.3 / 4
    # transformers adds up in fp32
    assert value == pytest.approx(loss.item(), rel=1e-6)
    extra = torch.autograd.grad(loss, inputs, allow_unused=True)
    assert extra[0].abs().max() > 1e-4
    for mine, before, more in zip(found, plain, extra, strict=True):
        torch.testing.assert_close(mine, before if more is None else before + more, rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        layer.eval()(x, segments)
    assert take_aux(layer, World.alone()) == 0.0


def test_correction_moves_against_the_load() -> None:
    layer, x = layer_of(SPECS["softmax-raw"]), tokens(24)
    layer.router.correction.zero_()
    set_balance(layer, MoEConfig(bias_rate=0.01), 1)
    load = torch.zeros(6)
    for padding in (0, 4):
        layer(x, stream(24, padding)).sum().backward()
        load += torch.bincount(layer.router(x).experts[: 24 - padding].flatten(), minlength=6)
    with torch.no_grad():
        layer.eval()(x, stream(24))
    update_correction(layer, World.alone(), 0.01)
    expected = 0.01 * torch.sign(load.mean() - load)
    assert expected.unique().numel() > 1
    torch.testing.assert_close(layer.router.correction, expected.double())
    update_correction(layer, World.alone(), 0.01)  # nothing has been seen since
    torch.testing.assert_close(layer.router.correction, expected.double())


def test_correction_is_neither_trained_nor_cast() -> None:
    layer = MoE(spec_of(SPECS["sigmoid-groups"]), 0).requires_grad_(True)
    assert "correction" not in dict(layer.router.named_parameters())
    assert "correction" in layer.router.state_dict()


@pytest.mark.parametrize("gate_parts", [("gate", "up"), ("up",), (None,)])
def test_adapter_is_its_delta(gate_parts: tuple[str | None, ...]) -> None:
    layer, x = MoE(spec_of(PLAIN), 0), tokens()
    adapt(layer, gate_parts)
    fill(layer, spec_of(PLAIN), World.alone())
    factors = [p for name, p in layer.named_parameters() if ".adapter." in name]
    grad = tokens(seed=2).detach()
    y = layer(x, stream(20))
    found = [y, *torch.autograd.grad(y, [x, *factors], grad)]
    weights, merged = {}, MoE(spec_of(PLAIN), 0).double()
    merged.load_state_dict({n: p for n, p in layer.state_dict().items() if ".adapter." not in n})
    for name in ("gate_up", "down"):
        linear, adapter = getattr(layer.experts, name), getattr(layer.experts, name).adapter
        with torch.no_grad():
            assert torch.equal(
                adapter.delta(adapter.lora_a[1:3], adapter.lora_b[1:3]),
                adapter.delta(adapter.lora_a, adapter.lora_b)[1:3],
            )
        block = torch.stack([adapter.layout.scatter(b) for b in adapter.lora_b])
        weights[f"experts.{name}.weight"] = linear.weight + 0.7 * block @ adapter.lora_a
        torch.testing.assert_close(
            adapter.delta(adapter.lora_a, adapter.lora_b).double(),
            0.7 * block @ adapter.lora_a,
            rtol=1e-5,
            atol=1e-6,
        )
    truth = torch.func.functional_call(merged, weights, (x, stream(20)))
    truth = [truth, *torch.autograd.grad(truth, [x, *factors], grad)]
    for mine, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(mine, expected)


def test_adapter_dropout_depends_on_token_and_expert() -> None:
    layer, x = MoE(spec_of(PLAIN), 0), tokens(200)
    adapt(layer, dropout=0.3)
    fill(layer, spec_of(PLAIN), World.alone())
    seen: list[Tensor] = []
    layer.experts.gate_up.adapter._drop = lambda x, groups, drop=layer.experts.gate_up.adapter._drop: (
        seen.append(drop(x, groups)) or seen[-1]
    )
    first, again, other = (layer(x, stream(200, key=key)) for key in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    masks = seen[0] == 0
    assert 0.28 < masks.double().mean() < 0.32
    row_of = layer.router(x).experts
    order = moe.sort_by_expert(row_of, 6)
    for token in range(5):  # the same token at two experts
        a, b = order.place[token].tolist()
        assert not torch.equal(masks[a], masks[b])
    layer.eval()
    assert torch.equal(layer(x, stream(200, key=1)), layer(x, stream(200, key=2)))


def test_runs_without_values() -> None:
    """What the planner does: the experts' loads are assumed to be even."""
    spec = spec_of(SPECS["sigmoid-groups"])
    with FakeTensorMode():
        layer = MoE(spec, 0)
        adapt(layer)
        set_balance(layer, MoEConfig(aux_loss=0.1, capacity=1.0, bias_rate=0.1), 2)
        x = torch.randn(20, HIDDEN, requires_grad=True)
        layer(x, stream(20)).sum().backward()
        assert x.grad.shape == x.shape
        assert layer.experts.down.weight.grad.shape == layer.experts.down.weight.shape
    assert moe.balanced_counts(11, 4) == (3, 3, 3, 2)
