"""glu with each of its bodies: against fp64, gradients included; odd sizes, strided views, repeats."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from megatune import ops
from tests.helpers.ops import compare, need_body
from tests.ops.bodies import DTYPES, TOLERANCE, bodies, repeats_bitwise


def check(body: str, device: str, dtype: torch.dtype, x: torch.Tensor, view=lambda x: x) -> None:
    need_body("glu", body, dtype, device)
    for activation in ("silu", "gelu", "gelu_tanh"):
        compare(
            "glu",
            body,
            lambda x, a=activation: ops.glu(view(x), a),
            (x,),
            dtype,
            device,
            tolerance=TOLERANCE[dtype],
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("body", "device"), bodies("glu"))
def test_sizes_and_views(body: str, device: str, dtype: torch.dtype) -> None:
    for width in (1, 7, 64, 129) + ((14336,) if device == "cuda" else ()):
        check(body, device, dtype, torch.randn(21, 2 * width) * 2)
    check(body, device, dtype, torch.randn(9, 208), lambda x: x[:, 8:136])  # aligned rows, far apart
    check(body, device, dtype, torch.randn(9, 131), lambda x: x[:, 1:129])  # odd addresses
    check(body, device, dtype, torch.randn(18, 64), lambda x: x[::2])


@pytest.mark.parametrize(("body", "device"), bodies("glu"))
def test_far_values_and_no_rows(body: str, device: str) -> None:
    need_body("glu", body, torch.float32, device)
    ops.configure({"glu": body}, device)
    gates = torch.tensor([-1e4, -200.0, -90.0, -1.0, 0.0, 90.0, 1e4], device=device)
    x = torch.stack((gates, torch.ones_like(gates)), -1).reshape(1, -1).requires_grad_()
    for activation in ("silu", "gelu", "gelu_tanh"):
        y = ops.glu(x, activation)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.isfinite(y).all() and torch.isfinite(grad).all()
        torch.testing.assert_close(y[0, -2:], gates[-2:])
        assert ops.glu(x[:0], activation).shape == (0, 7)


@pytest.mark.gpu
def test_repeats_and_opcheck_on_a_gpu() -> None:
    need_body("glu", "cuda", torch.bfloat16, "cuda")
    calls = torch.ops.megatune
    x, grad = (torch.randn(500, width, device="cuda").bfloat16() for width in (2048, 1024))
    repeats_bitwise(lambda: (calls.glu(x, 0), calls.glu_backward(grad, x, 0)))
    for operator, arguments in ((calls.glu, (x[:5, :30], 1)), (calls.glu_backward, (grad, x, 2))):
        assert set(opcheck(operator.default, arguments).values()) == {"SUCCESS"}
