"""glu and clamped_glu with each of its bodies: against fp64, gradients included; odd sizes, strided views, repeats."""

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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("body", "device"), bodies("clamped_glu"))
def test_clamped_sizes_and_views(body: str, device: str, dtype: torch.dtype) -> None:
    need_body("clamped_glu", body, dtype, device)

    def check(x: torch.Tensor, view=lambda x: x) -> None:
        x = x * 5  # a sixth of the values lies beyond the limit of 7
        compare(
            "clamped_glu",
            body,
            lambda x: ops.clamped_glu(view(x)),
            (x,),
            dtype,
            device,
            tolerance=TOLERANCE[dtype],
        )

    for width in (1, 7, 64, 129):
        check(torch.randn(21, 2 * width))
    check(torch.randn(9, 208), lambda x: x[:, 8:136])  # aligned rows, far apart
    check(torch.randn(9, 131), lambda x: x[:, 1:129])  # odd addresses
    check(torch.randn(128, 9), lambda x: x.t())


@pytest.mark.parametrize(("body", "device"), bodies("clamped_glu"))
def test_clamped_far_values_limits_and_no_rows(body: str, device: str) -> None:
    need_body("clamped_glu", body, torch.float32, device)
    ops.configure({"clamped_glu": body}, device)
    far = torch.tensor([-1e4, -7.0, 0.0, 7.0, 1e4], device=device)
    x = torch.cartesian_prod(far, far).reshape(1, -1).requires_grad_()
    y = ops.clamped_glu(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.isfinite(y).all() and torch.isfinite(grad).all()
    torch.testing.assert_close(y[0, -1], torch.tensor(56.0, device=device), rtol=1e-4, atol=0)
    beyond = x.detach().abs() > 7
    beyond[:, ::2] = x.detach()[:, ::2] > 7
    assert (
        not grad[beyond].any() and grad[0, 1::2].view(5, 5)[3, 3] != 0
    )  # the limit itself lets gradients through
    assert ops.clamped_glu(x[:0]).shape == (0, 25)


@pytest.mark.gpu
def test_repeats_and_opcheck_on_a_gpu() -> None:
    need_body("glu", "cuda", torch.bfloat16, "cuda")
    calls = torch.ops.megatune
    x, grad = (torch.randn(500, width, device="cuda").bfloat16() for width in (2048, 1024))
    repeats_bitwise(lambda: (calls.glu(x, 0), calls.glu_backward(grad, x, 0)))
    repeats_bitwise(lambda: (calls.clamped_glu(x), calls.clamped_glu_backward(grad, x)))
    examples = (
        (calls.glu, (x[:5, :30], 1)),
        (calls.glu_backward, (grad, x, 2)),
        (calls.clamped_glu, (x[:5, :30],)),
        (calls.clamped_glu_backward, (grad, x)),
    )
    for operator, arguments in examples:
        assert set(opcheck(operator.default, arguments).values()) == {"SUCCESS"}
