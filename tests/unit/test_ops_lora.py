"""lora_linear: equal to base weight plus product, gradients, fused weights, dropout, nothing saved in vain."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatune import ops
from megatune.ops import LoraLayout
from tests.helpers.ops import relative_error

FUSED = LoraLayout.of((("q", 6), ("k", 3), ("v", 3)), 4, ["q", "v"])
LAYOUTS = {"whole": LoraLayout.whole(48), "fused": FUSED}


def inputs(layout: LoraLayout, dtype: torch.dtype = torch.float64, rank: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = (10, 8), (48, 8), (48,), (layout.adapters * rank, 8), (layout.adapted_rows, rank)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def dense_change(layout: LoraLayout, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The weight's change, row by row, without the block matrix."""
    rank, rows, used = b.shape[1], [], 0
    for _ in range(layout.groups):
        for count, adapter in layout.parts:
            for _ in range(count):
                if adapter is None:
                    rows.append(torch.zeros_like(a[0]))
                else:
                    rows.append(b[used] @ a[adapter * rank : (adapter + 1) * rank])
                    used += 1
    return torch.stack(rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_merged_weight(layout: str) -> None:
    x, weight, bias, a, b = inputs(LAYOUTS[layout])
    merged = weight + 1.7 * dense_change(LAYOUTS[layout], a, b)
    expected = F.linear(x, merged, bias)
    actual = ops.lora_linear(x, weight, bias, a, b, LAYOUTS[layout], 1.7)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    leaves = (x, weight, bias, a, b)
    for one, two in zip(
        torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_with_dropout(layout: str) -> None:
    x, weight, bias, a, b = inputs(LAYOUTS[layout])
    keep = (torch.rand(10, 8) > 0.3) / 0.7
    assert torch.autograd.gradcheck(
        lambda x, w, c, a, b: ops.lora_linear(x, w, c, a, b, LAYOUTS[layout], 0.6, x * keep),
        (x, weight, bias, a, b),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp32_adapters_beside_low_precision(dtype: torch.dtype) -> None:
    truth = inputs(FUSED)
    x, weight, bias, a, b = [t.detach().to(dtype) for t in truth[:3]] + [
        t.detach().float() for t in truth[3:]
    ]
    x.requires_grad_(), a.requires_grad_(), b.requires_grad_()
    out = ops.lora_linear(x, weight, bias, a, b, FUSED, 1.7)
    grad = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad(out, (x, a, b), grad)
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32]
    expected = ops.lora_linear(*truth, FUSED, 1.7)
    wanted = torch.autograd.grad(expected, (truth[0], truth[3], truth[4]), grad.double())
    limit = 1e-6 if dtype == torch.float32 else 2e-2
    for actual, true in zip((out, *grads), (expected, *wanted), strict=True):
        assert relative_error(actual, true) < limit


def test_a_frozen_weight_costs_no_gradient_and_no_saved_input() -> None:
    x, weight, bias, a, b = inputs(FUSED)
    weight.requires_grad_(False), bias.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        dropped = x.detach() * 2
        out = ops.lora_linear(x, weight, bias, a, b, FUSED, 1.0, dropped)
    out.sum().backward()
    assert weight.grad is None and bias.grad is None
    # The dropped input, low-rank activations [10, 2 * 3], weight and the two matrices: not x as well.
    assert sorted(saved) == sorted([dropped.shape, (10, 6), weight.shape, a.shape, b.shape])


class Made(TorchDispatchMode):
    """Shapes of the tensors that operators make, one for each storage."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[int, torch.Size] = {}
        self.alive: list[torch.Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        before = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in before:
            self.alive.append(result)  # no address is used twice
            self.shapes.setdefault(result.untyped_storage().data_ptr(), result.shape)
        return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_of_full_size_but_the_results_and_nothing_for_a_frozen_weight(layout: str) -> None:
    layout = LAYOUTS[layout]
    x, a = torch.randn(400, 40, requires_grad=True), torch.randn(layout.adapters * 3, 40, requires_grad=True)
    b, weight = torch.randn(layout.adapted_rows, 3, requires_grad=True), torch.randn(48, 40)
    with Made() as forward:
        out = ops.lora_linear(x, weight, None, a, b, layout, 1.7)
    grad = torch.randn(400, 48)
    with Made() as backward:
        torch.autograd.grad(out, (x, a, b), grad)
    for made, result in ((forward, out.shape), (backward, x.shape)):
        assert [shape for shape in made.shapes.values() if shape.numel() >= 400 * 40] == [result]
        assert weight.shape not in made.shapes.values()


def test_first_layer_without_a_gradient_for_its_input() -> None:
    x, weight, bias, a, b = inputs(FUSED)
    x.requires_grad_(False)
    ops.lora_linear(x, weight, bias, a, b, FUSED, 1.0).sum().backward()
    assert x.grad is None and a.grad is not None


@pytest.mark.parametrize("targets", [["q"], ["k"], ["q", "k", "v"], ["v", "q"]])
def test_scatter_and_gather_are_each_other_s_transpose(targets: list[str]) -> None:
    layout = LoraLayout.of((("q", 6), ("k", 3), ("v", 3)), 4, targets)
    b, block = torch.randn(layout.adapted_rows, 2), torch.randn(layout.rows, layout.adapters * 2)
    scattered = layout.scatter(b)
    assert torch.equal(layout.gather(scattered), b)
    torch.testing.assert_close((scattered * block).sum(), (b * layout.gather(block)).sum())
    assert (scattered != 0).sum() == b.numel()


def test_no_tokens() -> None:
    _, weight, bias, a, b = inputs(FUSED)
    x = torch.zeros(0, 8, dtype=torch.float64, requires_grad=True)
    out = ops.lora_linear(x, weight, bias, a, b, FUSED, 1.0)
    out.sum().backward()
    assert out.shape == (0, 48)
    assert not a.grad.any() and not b.grad.any() and x.grad.shape == (0, 8)


def test_wrong_arguments_are_named() -> None:
    x, weight, bias, a, b = inputs(FUSED)
    for message, call in (
        ("weight", lambda: ops.lora_linear(x, weight[:40], bias, a, b, FUSED, 1.0)),
        ("same dtype", lambda: ops.lora_linear(x.float(), weight, bias, a, b, FUSED, 1.0)),
        ("a \\(5, 8\\)", lambda: ops.lora_linear(x, weight, bias, a[:5], b, FUSED, 1.0)),
        ("b \\(36, 2\\)", lambda: ops.lora_linear(x, weight, bias, a, b[:, :2], FUSED, 1.0)),
        ("x_dropped", lambda: ops.lora_linear(x, weight, bias, a, b, FUSED, 1.0, x[:5])),
        ("a is on meta", lambda: ops.lora_linear(x, weight, bias, a.to("meta"), b, FUSED, 1.0)),
        ("targets \\['gate'\\]", lambda: LoraLayout.of((("q", 6),), 4, ["gate"])),
        ("targets \\[\\]", lambda: LoraLayout.of((("q", 6),), 4, [])),
    ):
        with pytest.raises(ValueError, match=message):
            call()
