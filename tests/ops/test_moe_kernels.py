"""Mixture of experts with each body: the router's choice and weights, rows to their experts and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from megatune import ops
from megatune.ops import moe
from tests.helpers.ops import compare, need_body, relative_error
from tests.ops.bodies import DTYPES, QUICK, TOLERANCE, few, repeats_bitwise

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
ROUTERS = [pytest.param("reference", "cpu", id="reference-cpu")]
ROUTERS += [
    pytest.param(name, "cuda", id=f"{name}-cuda", marks=pytest.mark.gpu) for name in ops.BODIES["router"]
]
ROWS = [pytest.param("reference", "cpu", id="reference-cpu")]
ROWS += [
    pytest.param(name, "cuda", id=f"{name}-cuda", marks=pytest.mark.gpu) for name in ops.BODIES["expert_rows"]
]

# (experts, k, groups, groups of a token)
SIZES = [(6, 2, 1, 1), (8, 3, 4, 2), (33, 5, 3, 2), (64, 8, 8, 8)]
LARGE = [(128, 8, 1, 1), (127, 7, 1, 1), (128, 12, 1, 1), (256, 8, 8, 4), (300, 8, 1, 1)]
LARGE += [(511, 16, 1, 1), (512, 16, 32, 5), (512, 2, 1, 1)]
# The least distance of two scores that a choice tells apart, of the largest one: fp32 rounds to 6e-8.
APART = 1e-5


def plain(
    logits: Tensor, top_k: int, score: str, normalise: bool, scale: float, **how
) -> tuple[Tensor, Tensor]:
    """(weights of all experts [T, E], 0 for those not chosen; probabilities), by autograd; the choice is given."""
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, how["experts"], True)
    if score == "sigmoid":
        scores = logits.sigmoid()
        probabilities = scores / scores.sum(1, keepdim=True)
    else:
        probabilities = scores = logits.softmax(1)
    if score == "topk_softmax":
        weights = logits.masked_fill(~chosen, -torch.inf).softmax(1)
    else:
        weights = scores * chosen
        if normalise:
            weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return weights * scale, probabilities


def chosen_by_hand(
    logits: Tensor, top_k: int, score: str, correction: Tensor | None, groups: int, some: int
) -> tuple[Tensor, Tensor]:
    """(the chosen experts [T, K]; whether all that decided on them lay `APART` [T])."""
    scores = {"softmax": logits.softmax(1), "sigmoid": logits.sigmoid()}.get(score, logits)
    size = scores.abs().amax(1)
    if correction is not None:
        scores, size = scores + correction, size + correction.abs().max()
    best_two = scores.unflatten(1, (groups, -1)).sort(dim=2, descending=True).values[:, :, :2].sum(2)
    sums, order = best_two.sort(dim=1, descending=True, stable=True)
    allowed = torch.zeros_like(best_two, dtype=torch.bool).scatter_(1, order[:, :some], True)
    allowed = allowed.repeat_interleave(logits.shape[1] // groups, 1)
    ranked, experts = scores.masked_fill(~allowed, -torch.inf).sort(dim=1, descending=True, stable=True)
    # Each chosen one from the next, the first not chosen among them; the last chosen group from the one after.
    steps = [ranked[:, i] - ranked[:, i + 1] for i in range(min(top_k, logits.shape[1] - 1))]
    steps += [sums[:, some - 1] - sums[:, some]] if some < groups else []
    return experts[:, :top_k], torch.stack(steps).amin(0) > APART * size


def clear_choices(
    tokens: int, experts: int, top_k: int, score: str, corrected: bool, groups: int, some: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(logits, correction, chosen experts) of which no choice hangs on how a device rounds its sigmoid.

    Every other token's logits are 1e-4 from rank to rank: near, yet further than rounding.
    """
    for _ in range(20):
        correction = torch.randn(experts) * 0.2 if corrected else None
        logits = torch.randn(4 * tokens, experts)
        logits[1::2] = torch.rand(2 * tokens, experts).argsort(1) * 1e-4
        wide = None if correction is None else correction.double()
        chosen, apart = chosen_by_hand(logits.double(), top_k, score, wide, groups, some)
        # As many of the one kind as of the other, a token more of the first where the number is odd.
        kinds = [apart[kind::2].nonzero()[: (tokens + 1 - kind) // 2, 0] * 2 + kind for kind in (0, 1)]
        rows = torch.cat(kinds).sort().values
        if len(rows) == tokens:
            return logits[rows], correction, chosen[rows]
    raise AssertionError(f"no clear choices of {top_k} of {experts} experts")


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "topk_softmax"])
@pytest.mark.parametrize(("body", "device"), ROUTERS)
def test_router(body: str, device: str, score: str) -> None:
    need_body("router", body, torch.float32, device)
    ops.configure({"router": body}, device)
    for experts, top_k, groups, some in SIZES + (LARGE if device == "cuda" else []):
        tokens = 300 if device == "cuda" else 21
        for corrected in (False, True):
            logits, correction, expected = clear_choices(
                tokens, experts, top_k, score, corrected, groups, some
            )
            for normalise, scale in ((True, 1.0), (False, 2.5)):
                how = {"score": score, "normalise": normalise, "scale": scale}
                leaf = logits.to(device).requires_grad_()
                placed = None if correction is None else correction.to(device)
                found, weights, probabilities = ops.route(
                    leaf, top_k, correction=placed, groups=groups, groups_per_token=some, **how
                )
                assert torch.equal(found.cpu(), expected)
                truth = logits.double().requires_grad_()
                all_weights, all_probabilities = plain(truth, top_k, experts=expected, **how)
                pairs = [(weights, all_weights.gather(1, expected)), (probabilities, all_probabilities)]
                seeds = [torch.randn(one.shape) for one, _ in pairs]
                for number in (1, 2):  # without a gradient of the probabilities, and with one
                    losses = [
                        sum(
                            (pair[i] * seed.to(pair[i])).sum()
                            for pair, seed in list(zip(pairs, seeds, strict=True))[:number]
                        )
                        for i in (0, 1)
                    ]
                    pairs_of_grads = [
                        torch.autograd.grad(loss, x, retain_graph=True)[0]
                        for loss, x in zip(losses, (leaf, truth), strict=True)
                    ]
                    # One normalised choice weighs 1 whatever the logits are: there the true gradient is 0.
                    found_grad, true_grad = (grad.detach().double().cpu() for grad in pairs_of_grads)
                    assert (found_grad - true_grad).norm() < 5e-6 * true_grad.norm().clamp_min(1e-2)
                assert all(relative_error(one, two) < 2e-6 for one, two in pairs)


@pytest.mark.gpu
def test_of_equal_scores_the_lower_number() -> None:
    need_body("router", "cuda", torch.float32, "cuda")
    ops.configure({"router": "cuda"}, "cuda")
    for experts in (8, 100, 128, 512):
        equal = torch.zeros(5, experts, device="cuda")
        assert torch.equal(ops.route(equal, 6)[0].cpu(), torch.arange(6).expand(5, 6))
        steps = (torch.arange(experts, device="cuda") // 3).float().expand(3, -1).contiguous()
        order = steps[0].cpu().sort(descending=True, stable=True).indices[:6]
        assert torch.equal(ops.route(steps, 6, score="topk_softmax")[0].cpu(), order.expand(3, 6))
        # Neighbours in their last bits.
        near = 1 + torch.stack([torch.randperm(experts, device="cuda") for _ in range(50)]) * 2**-23
        order = near.sort(descending=True, stable=True).indices[:, :7]
        assert torch.equal(ops.route(near, 7, score="topk_softmax")[0], order)
        # Whatever the logits are, the choice is of experts that exist, each once.
        for bad in (float("nan"), float("inf"), -float("inf")):
            wrong = torch.randn(4, experts, device="cuda")
            wrong[:, ::2] = bad
            found = ops.route(wrong, 8, score="topk_softmax")[0].cpu()
            assert ((found >= 0) & (found < experts)).all()
            assert all(len(set(row)) == 8 for row in found.tolist())


def test_what_does_not_fit_is_refused() -> None:
    logits = torch.randn(4, 6)
    for arguments, how, message in (
        ((logits[0], 2), {}, "logits .* must be fp32"),
        ((logits.bfloat16(), 2), {}, "logits .* must be fp32"),
        ((logits, 7), {}, "top_k 7 must be from 1 to 6"),
        ((logits, 4), {"groups": 2, "groups_per_token": 1}, "top_k 4 must be from 1 to 3"),
        ((logits, 2), {"groups": 4}, "6 experts must be in equal groups"),
        ((logits, 2), {"score": "best"}, "score 'best' must be one of softmax"),
        ((logits, 2), {"correction": torch.zeros(5)}, r"correction \(5,\) must be \[6\]"),
    ):
        with pytest.raises(ValueError, match=f"router: {message}"):
            ops.route(*arguments, **how)


def an_order(tokens: int, experts: int, top_k: int, drops: bool) -> moe.Order:
    generator = torch.Generator().manual_seed(5)
    chosen = torch.rand(tokens, experts, generator=generator).topk(top_k, 1).indices
    if drops:
        chosen = chosen.masked_fill(torch.rand(chosen.shape, generator=generator) < 0.3, experts)
    return moe.sort_by_expert(chosen, experts, drops)


def on(order: moe.Order, device: torch.device) -> moe.Order:
    groups = moe.Groups(order.groups.counts.to(device), order.groups.rows)
    return moe.Order(order.source.to(device), order.place.to(device), groups, order.drops)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("body", "device"), ROWS)
def test_rows_there_and_back(body: str, device: str, dtype: torch.dtype) -> None:
    need_body("expert_rows", body, dtype, device)
    sizes = [(13, 8, 2), (7, 33, 5), (2, 16, 1)]
    if device == "cuda":
        sizes += [(500, 2048, 8), (300, 1000, 16), (90, 2304, 3), (40, 7168, 6), (9, 40, 40)]
    for tokens, width, top_k in few(body, sizes, 1):
        for drops in (False, True):
            order = an_order(tokens, max(6, top_k), top_k, drops)

            def there(x: Tensor, order=order) -> Tensor:
                return moe.permute(x[:, 1:-1], on(order, x.device))

            def back(rows: Tensor, weights: Tensor, order=order) -> Tensor:
                return moe.combine(
                    rows, weights.to(torch.promote_types(rows.dtype, torch.float32)), on(order, rows.device)
                )

            rows = torch.randn(order.groups.rows, width)
            limit = TOLERANCE[dtype]
            compare(
                "expert_rows", body, there, (torch.randn(tokens, width + 2),), dtype, device, tolerance=limit
            )
            compare(
                "expert_rows", body, back, (rows, torch.rand(tokens, top_k)), dtype, device, tolerance=limit
            )


@pytest.mark.parametrize(("body", "device"), ROWS)
def test_what_is_not_wanted_is_not_computed_and_no_rows(body: str, device: str) -> None:
    need_body("expert_rows", body, torch.float32, device)
    ops.configure({"expert_rows": body}, device)
    order = on(an_order(9, 6, 3, True), torch.device(device))
    for rows_grad, weights_grad in ((True, False), (False, True)):
        rows = torch.randn(order.groups.rows, 8, device=device, requires_grad=rows_grad)
        weights = torch.rand(9, 3, device=device, requires_grad=weights_grad)
        moe.combine(rows, weights, order).sum().backward()
        assert (rows.grad is not None) == rows_grad and (weights.grad is not None) == weights_grad
    nothing = on(moe.sort_by_expert(torch.full((4, 2), 6), 6, True), torch.device(device))
    rows, weights = (torch.zeros(*shape, device=device, requires_grad=True) for shape in ((0, 8), (4, 2)))
    y = moe.combine(rows, weights, nothing)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y)) and torch.equal(weights.grad, torch.zeros_like(weights))
    assert rows.grad.shape == (0, 8)


def operator_calls(device: str):
    calls = torch.ops.megatune
    logits = torch.randn(5, 8, device=device)
    experts, weights, probabilities = calls.router(logits, None, 2, 0, True, 1.0, 1, 1)
    yield calls.router, (logits, None, 2, 1, True, 1.0, 4, 2)
    yield calls.router, (logits, logits[0].clone(), 3, 2, False, 2.0, 1, 1)
    yield calls.router_backward, (weights, None, logits, experts, 0, True, 1.0)
    yield calls.router_backward, (weights, probabilities, logits, experts, 1, False, 1.5)
    x, place = (
        torch.randn(5, 12, device=device)[:, :10],
        torch.tensor([[0, 3], [5, -1], [2, 7]], device=device),
    )
    yield calls.expert_take, (x, place.flatten())
    yield calls.expert_sum, (x, place, None)
    yield calls.expert_sum, (x, place, torch.rand(3, 2, device=device))
    # Each row is the place of one assignment; the others have none.
    place = torch.tensor([[1, 2], [9, -1], [3, 0]], device=device)
    yield calls.expert_copies, (x[:3], place, 3)
    sums = torch.rand(3, 2, device=device), place, 3
    yield calls.expert_sum_backward, (x[:3], x[2:], *sums, True)
    yield calls.expert_sum_backward, (x[:3], None, *sums, True)
    yield calls.expert_sum_backward, (x[:3], x[2:], *sums, False)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_opcheck(device: str) -> None:
    if device == "cuda":
        need_body("router", "cuda", torch.float32, "cuda")
    for operator, arguments in operator_calls(device):
        assert set(opcheck(operator.default, arguments, test_utils=QUICK).values()) == {"SUCCESS"}


@pytest.mark.gpu
def test_operators_on_a_gpu_equal_those_on_a_cpu() -> None:
    need_body("router", "cuda", torch.float32, "cuda")
    for operator, arguments in operator_calls("cuda"):
        found = operator(*arguments)
        expected = operator(*(x.cpu() if isinstance(x, Tensor) else x for x in arguments))
        for one, two in zip(*((x,) if isinstance(x, Tensor) else x for x in (found, expected)), strict=True):
            torch.testing.assert_close(one.cpu(), two, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_repeats_are_equal_bit_by_bit() -> None:
    need_body("expert_rows", "cuda", torch.bfloat16, "cuda")
    order = on(an_order(2000, 64, 8, True), torch.device("cuda"))
    rows, grad = (torch.randn(n, 1024, device="cuda").bfloat16() for n in (order.groups.rows, 2000))
    calls, weights = torch.ops.megatune, torch.rand(2000, 8, device="cuda")
    logits = torch.randn(2000, 64, device="cuda")
    experts, weight, probabilities = calls.router(logits, None, 8, 0, True, 1.0, 1, 1)
    repeats_bitwise(
        lambda: (
            calls.expert_sum(rows, order.place, weights),
            *calls.expert_sum_backward(grad, rows, weights, order.place, len(rows), True),
            *calls.router(logits, None, 8, 0, True, 1.0, 1, 1),
            calls.router_backward(weight, probabilities, logits, experts, 0, True, 1.0),
        )
    )
