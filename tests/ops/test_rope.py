"""rope with each of its bodies: against fp64, gradients included; views of a fused qkv, part of the head, repeats."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from megatune import ops
from tests.helpers.ops import compare, need_body
from tests.ops.bodies import DTYPES, TOLERANCE, bodies, few, repeats_bitwise


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("body", "device"), bodies("rope"))
@pytest.mark.parametrize("half", [1, 3, 16, 20, 64])
def test_views_and_parts_of_heads(body: str, device: str, dtype: torch.dtype, half: int) -> None:
    need_body("rope", body, dtype, device)
    angle = torch.randn(11, half) * 50
    cos, sin = angle.cos().to(device), angle.sin().to(device)

    def turn(view):
        def run(x: torch.Tensor) -> torch.Tensor:
            heads = view(x)
            q, k = ops.rope(heads[:, :, :-1], heads[:, :, -1], cos.to(x.device), sin.to(x.device))
            return torch.cat((q, k.unsqueeze(2)), 2)

        return run

    views = [lambda x: x[:, :, :3], lambda x: x[:, 1:, 1:], lambda x: x.transpose(1, 2)]
    for width in few(body, [2 * half, 2 * half + 1, 2 * half + 8]):
        x = torch.randn(11, 2, 5, width)
        for view in few(body, views, 1):
            compare("rope", body, turn(view), (x,), dtype, device, tolerance=TOLERANCE[dtype])
    for heads in (2, 34):
        x = torch.randn(11, 1, heads, 2 * half)
        compare("rope", body, turn(lambda x: x), (x,), dtype, device, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize(("body", "device"), bodies("rope"))
def test_no_tokens_and_no_heads(body: str, device: str) -> None:
    need_body("rope", body, torch.float32, device)
    ops.configure({"rope": body}, device)
    angle = torch.zeros(4, 8, device=device)
    for shape in ((4, 2, 0, 16), (4, 0, 3, 16), (0, 2, 3, 16)):
        q = torch.ones(shape, device=device)
        k = torch.ones(*shape[:2], 16, device=device)
        found = ops.rope(q, k, angle[: shape[0]], angle[: shape[0]])
        assert [x.shape for x in found] == [q.shape, k.shape]


@pytest.mark.gpu
def test_repeats_and_opcheck_on_a_gpu() -> None:
    need_body("rope", "cuda", torch.bfloat16, "cuda")
    call = torch.ops.megatune.rope
    x, angle = torch.randn(300, 4, 6, 128, device="cuda").bfloat16(), torch.randn(300, 64, device="cuda")
    arguments = (x[:, :, :4], x[:, :, 4], angle.cos(), angle.sin(), True)
    repeats_bitwise(lambda: call(*arguments))
    assert set(opcheck(call.default, arguments).values()) == {"SUCCESS"}
