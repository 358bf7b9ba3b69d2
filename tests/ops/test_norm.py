"""rms_norm with each of its bodies: against fp64, gradients included; odd sizes, strided views, repeats."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from megatune import ops
from tests.helpers.ops import compare, need_body
from tests.ops.bodies import DTYPES, TOLERANCE, bodies, repeats_bitwise

# Rows of a few lanes, of a warp, of a block; odd ones, and some that do not fit into registers. (A row of one element
# has no gradient but what eps leaves: nothing to compare.)
WIDTHS = [8, 64, 96, 127, 264, 1000]
LONG = [1024, 2048, 4096, 5120, 8192, 14336, 16384, 20001, 40008]


def check(body: str, device: str, dtype: torch.dtype, inputs, view=lambda x: x, offset: float = 0.0) -> None:
    need_body("rms_norm", body, dtype, device)
    compare(
        "rms_norm",
        body,
        lambda x, weight: ops.rms_norm(view(x), weight, 1e-5, offset),
        inputs,
        dtype,
        device,
        tolerance=TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("body", "device"), bodies("rms_norm"))
def test_widths(body: str, device: str, dtype: torch.dtype) -> None:
    for width in WIDTHS + (LONG if device == "cuda" else []):
        for offset in (0.0, 1.0):
            check(body, device, dtype, (torch.randn(37, width), torch.randn(width)), offset=offset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("body", "device"), bodies("rms_norm"))
def test_views(body: str, device: str, dtype: torch.dtype) -> None:
    for width in (64, 40, 33):
        inputs = (torch.randn(9, 2, 5, width), torch.randn(width))
        check(body, device, dtype, inputs, lambda x: x[:, :, 1:4])
        check(body, device, dtype, inputs, lambda x: x[::2, 1, 3:])
    # Rows that begin at an odd address, and far from each other.
    check(body, device, dtype, (torch.randn(9, 130), torch.randn(128)), lambda x: x[:, 1:129])
    check(body, device, dtype, (torch.randn(9, 136), torch.randn(128)), lambda x: x[:, 8:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("body", "device"), bodies("add_rms_norm"))
def test_the_norm_of_a_sum(body: str, device: str, dtype: torch.dtype) -> None:
    need_body("add_rms_norm", body, dtype, device)

    def both(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """As a decoder uses it: the sum goes on, and so does its norm."""
        total, y = ops.add_rms_norm(x[:, 1:], residual, weight, 1e-5, 1.0)
        return torch.cat((total, y), -1)

    for width in [7, 64, 1000] + ([4096, 20001] if device == "cuda" else []):
        inputs = (torch.randn(37, 4, width), torch.randn(37, 3, width), torch.randn(width))
        compare("add_rms_norm", body, both, inputs, dtype, device, tolerance=TOLERANCE[dtype])


def test_a_residual_that_does_not_fit_is_refused() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8)
    for residual in (x[:3], x.bfloat16()):
        with pytest.raises(ValueError, match="add_rms_norm: residual .* must be like x"):
            ops.add_rms_norm(x, residual, weight, 1e-5)


@pytest.mark.parametrize(("body", "device"), bodies("rms_norm"))
def test_no_rows(body: str, device: str) -> None:
    need_body("rms_norm", body, torch.float32, device)
    ops.configure({"rms_norm": body}, device)
    x, weight = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((0, 64), (64,)))
    y = ops.rms_norm(x, weight, 1e-5)
    y.sum().backward()
    assert y.shape == (0, 64)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize(("body", "device"), bodies("rms_norm"))
def test_a_weight_of_another_dtype(body: str, device: str) -> None:
    need_body("rms_norm", body, torch.bfloat16, device)
    for offset in (0.0, 1.0):
        x, weight = torch.randn(5, 256).bfloat16(), torch.randn(256)
        ops.configure({}, "cpu")
        truth = ops.rms_norm(x.double(), weight.double(), 1e-5, offset)
        ops.configure({"rms_norm": body}, device)
        y = ops.rms_norm(x.to(device), weight.to(device), 1e-5, offset)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.cpu().double(), truth, rtol=2e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [128, 2048, 8192])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_repeats_are_equal_bit_by_bit(width: int, weight_dtype: torch.dtype) -> None:
    need_body("rms_norm", "cuda", torch.bfloat16, "cuda")
    x, grad = (torch.randn(4001, width, device="cuda").bfloat16() for _ in range(2))
    weight = torch.randn(width, device="cuda", dtype=weight_dtype)
    calls = torch.ops.megatune
    y, rstd = calls.rms_norm(x, weight, 1e-5, 0.0)
    repeats_bitwise(lambda: (*calls.rms_norm_backward(grad, x, weight, rstd, 0.0, True), y))
    total = torch.randn_like(x)
    repeats_bitwise(lambda: calls.add_rms_norm_backward(grad, total, x, weight, rstd, 0.0, True))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [8, 104, 512, 3072, 8192, 12288])
def test_gradients_of_many_rows(width: int) -> None:
    """Every way that the kernels have to go through rows, with more rows than are at work at the same time."""
    need_body("rms_norm", "cuda", torch.bfloat16, "cuda")
    calls = torch.ops.megatune
    tokens = 40001 if width < 512 else 997
    x = torch.randn(tokens, 4, width, device="cuda").bfloat16()[:, 1:]
    grad, grad_sum = (torch.randn(tokens, 3, width, device="cuda").bfloat16() for _ in range(2))
    weight = torch.randn(width, device="cuda").bfloat16()
    _, rstd = calls.rms_norm(x, weight, 1e-5, 1.0)
    h = x.double() * rstd.double().unsqueeze(-1)
    g = grad.double() * (1.0 + weight.double())
    truth = (g - h * (g * h).mean(-1, keepdim=True)) * rstd.double().unsqueeze(-1)
    of_weight = (grad.double() * h).sum((0, 1))
    for more, found in (
        (0.0, calls.rms_norm_backward(grad, x, weight, rstd, 1.0, True)),
        (grad_sum, calls.add_rms_norm_backward(grad, grad_sum, x, weight, rstd, 1.0, True)),
    ):
        assert [part.dtype for part in found] == [torch.bfloat16] * 2
        for part, right in zip(found, (truth + more, of_weight), strict=True):
            torch.testing.assert_close(part.double(), right, rtol=1e-2, atol=2e-3)


@pytest.mark.gpu
def test_opcheck_on_a_gpu() -> None:
    need_body("rms_norm", "cuda", torch.bfloat16, "cuda")
    calls = torch.ops.megatune
    x, weight = torch.randn(6, 3, 8, device="cuda"), torch.randn(8, device="cuda")
    y, rstd = calls.rms_norm(x, weight, 1e-5, 0.0)
    for operator, arguments in (
        (calls.rms_norm, (x[:, 1:], weight, 1e-5, 1.0)),
        (calls.rms_norm_backward, (y, x, weight, rstd, 0.0, True)),
        (calls.rms_norm_backward, (y, x, weight, rstd, 1.0, False)),
        (calls.add_rms_norm, (x, y, weight, 1e-5, 1.0)),
        (calls.add_rms_norm_backward, (y, y, x, weight, rstd, 0.0, True)),
    ):
        assert set(opcheck(operator.default, arguments).values()) == {"SUCCESS"}


def test_opcheck_of_the_norm_of_a_sum() -> None:
    calls = torch.ops.megatune
    x, residual, weight = torch.randn(6, 3, 8), torch.randn(6, 4, 8)[:, 1:], torch.randn(8)
    total, y, rstd = calls.add_rms_norm(x, residual, weight, 1e-5, 0.0)
    for operator, arguments in (
        (calls.add_rms_norm, (x, residual, weight, 1e-5, 1.0)),
        (calls.add_rms_norm_backward, (y, y, total, weight, rstd, 0.0, True)),
    ):
        assert set(opcheck(operator.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.gpu
def test_what_the_kernel_cannot_read_is_an_error() -> None:
    need_body("rms_norm", "cuda", torch.float32, "cuda")
    call = torch.ops.megatune.rms_norm
    x, weight = torch.randn(4, 8, device="cuda"), torch.randn(8, device="cuda")
    for wrong in ((x.t(), weight[:4]), (x, weight[:4]), (x, weight.cpu()), (x.double(), weight)):
        with pytest.raises(RuntimeError, match=r"megatune::rms_norm|megatune"):
            call(*wrong, 1e-5, 0.0)
