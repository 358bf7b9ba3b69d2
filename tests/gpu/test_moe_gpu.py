"""The mixture-of-experts layer on a GPU in bf16: grouped products, the whole layer, bitwise repeatable."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatune.config.schema import MoEConfig
from megatune.models.moe import MoE, set_balance
from megatune.models.spec import DecoderSpec, LayerSpec, MoESpec
from megatune.ops import OPS, Segments, configure
from megatune.ops.moe import Groups
from megatune.parallel import World
from tests.helpers.experts import adapt, fill
from tests.helpers.ops import relative_error

pytestmark = pytest.mark.gpu

HIDDEN = 64
KINDS = {
    "plain": MoESpec(8, 2, 48),
    "deepseek": MoESpec(16, 4, 40, 24, "sigmoid", scale=2.5, groups=4, groups_per_token=2, correction=True),
    "gpt-oss": MoESpec(8, 2, 48, score="topk_softmax", router_bias=True, expert_bias=True, clamped=True),
}


@pytest.fixture(autouse=True)
def _nan_in_new_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    configure({}, "cuda")


def spec_of(moe: MoESpec) -> DecoderSpec:
    layer = (LayerSpec(rope=None, moe=True),)
    return DecoderSpec("mixtral", 8, HIDDEN, 16, 2, 2, 32, layer, (), 64, moe=moe)


@pytest.mark.parametrize("counts", [(3, 0, 61, 1), (0, 0, 5, 0), (0, 0, 0, 0), (1024, 7, 0, 129)])
def test_grouped_products_equal_the_loop(counts: tuple[int, ...]) -> None:
    rows, seed = sum(counts), torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=seed).to("cuda", torch.bfloat16)

    x, weight, bias, grad = draw(rows, 64), draw(4, 96, 64), draw(4, 96), draw(rows, 96)
    groups = Groups(torch.tensor(counts, device="cuda"), rows)
    assert OPS["grouped_linear"].pick("cuda", torch.bfloat16).name == "grouped_mm"
    found, truth = [], []
    for results, body, wide in ((found, "grouped_mm", torch.bfloat16), (truth, "reference", torch.float64)):
        run = OPS["grouped_linear"].bodies[body].run
        wx, ww, wb, wg = (t.to(wide) for t in (x, weight, bias, grad))
        results += [
            run[0](wx, ww, wb, groups),
            run[1](wg, ww, groups),
            run[2](wg, wx, groups),
            run[3](wg, groups),
        ]
    for mine, expected in zip(found, truth, strict=True):
        assert mine.dtype == torch.bfloat16 and mine.shape == expected.shape
        assert relative_error(mine, expected) < 5e-3 if rows else not mine.any()
    for total in (found[2], found[3]):
        assert not any(total[expert].any() for expert, count in enumerate(counts) if not count)


@pytest.mark.parametrize("capacity", [None, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_layer_in_bf16(kind: str, capacity: float | None) -> None:
    """Close to fp64 on the CPU where both choose the same experts, and the same bits twice."""
    spec = spec_of(KINDS[kind])
    seed = torch.Generator().manual_seed(3)
    x, grad = torch.randn(2, 200, HIDDEN, generator=seed).bfloat16()
    segments = Segments.from_lengths([150, 50])
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16), ("cuda", torch.bfloat16)):
        layer = MoE(spec, 0)
        adapt(layer, dropout=0.2)
        fill(layer, spec, World.alone())
        layer.bfloat16().to(device, dtype)
        set_balance(layer, MoEConfig(aux_loss=0.1, capacity=capacity), 1)
        inputs = x.to(device, dtype).requires_grad_()
        y = layer(inputs, segments.to(device))
        y.backward(grad.to(device, dtype))
        results.append([y, inputs.grad, *(p.grad for p in layer.parameters())])
    for truth, mine, again in zip(*results, strict=True):
        assert torch.equal(mine, again)
        assert relative_error(mine, truth) < 3e-2
