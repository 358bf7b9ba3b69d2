"""rope with each of its bodies: against fp64, gradients included; views of a fused qkv, part of the head, repeats."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from megatune import ops
from tests.helpers.ops import compare, need_body
from tests.ops.bodies import DTYPES, TOLERANCE, bodies, repeats_bitwise


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("body", "device"), bodies("rope"))
@pytest.mark.parametrize("half", [1, 3, 16, 20, 64])
def test_views_and_parts_of_heads(body: str, device: str, dtype: torch.dtype, half: int) -> None:
    need_body("rope", body, dtype, device)
    angle = torch.randn(11, half) * 50
    cos, sin = angle.cos().to(device), angle.sin().to(device)

    def turn(view):
        return lambda x: ops.rope(view(x), cos.to(x.device), sin.to(x.device))

    for width in (2 * half, 2 * half + 1, 2 * half + 8):
        x = torch.randn(11, 2, 5, width)
        for view in (lambda x: x[:, :, :3], lambda x: x[:, :, 3], lambda x: x[:, 1:, 1:]):
            compare("rope", body, turn(view), (x,), dtype, device, tolerance=TOLERANCE[dtype])
    for heads in (1, 33):
        compare(
            "rope",
            body,
            turn(lambda x: x),
            (torch.randn(11, heads, 2 * half),),
            dtype,
            device,
            tolerance=TOLERANCE[dtype],
        )


@pytest.mark.parametrize(("body", "device"), bodies("rope"))
def test_no_tokens_and_no_heads(body: str, device: str) -> None:
    need_body("rope", body, torch.float32, device)
    ops.configure({"rope": body}, device)
    angle = torch.zeros(4, 8, device=device)
    assert ops.rope(torch.zeros(4, 0, 16, device=device), angle, angle).shape == (4, 0, 16)
    assert ops.rope(torch.zeros(0, 3, 16, device=device), angle[:0], angle[:0]).shape == (0, 3, 16)


@pytest.mark.gpu
def test_repeats_and_opcheck_on_a_gpu() -> None:
    need_body("rope", "cuda", torch.bfloat16, "cuda")
    call = torch.ops.megatune.rope
    x, angle = torch.randn(300, 4, 6, 128, device="cuda").bfloat16(), torch.randn(300, 64, device="cuda")
    arguments = (x[:, :, :4], angle.cos(), angle.sin(), True)
    repeats_bitwise(lambda: (call(*arguments),))
    assert set(opcheck(call.default, arguments).values()) == {"SUCCESS"}
