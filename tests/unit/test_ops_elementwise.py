"""rms_norm, layer_norm, rope and glu: every body against the reference in fp64, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatune import ops
from tests.helpers.ops import DTYPES, compare, need_body, relative_error

BODIES = ["reference", "cpu"]


@pytest.fixture(autouse=True)
def _same_numbers_and_automatic_bodies():
    torch.manual_seed(0)
    yield
    ops.configure({}, "cpu")


def angles(tokens: int, half: int) -> tuple[Tensor, Tensor]:
    angle = torch.randn(tokens, half) * 3
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(33, 64), (5, 37), (1, 17), (7, 3, 5, 48)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("body", BODIES)
def test_rms_norm(body: str, dtype: torch.dtype, shape: tuple[int, ...], offset: float) -> None:
    need_body("rms_norm", body, dtype)
    x, weight = torch.randn(shape), torch.randn(shape[-1])
    compare("rms_norm", body, lambda x, w: ops.rms_norm(x, w, 1e-5, offset), (x, weight), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("body", BODIES)
def test_rms_norm_of_a_view_of_the_heads(body: str, dtype: torch.dtype) -> None:
    need_body("rms_norm", body, dtype)
    qkv, weight = torch.randn(9, 2, 5, 16), torch.randn(16)
    compare("rms_norm", body, lambda x, w: ops.rms_norm(x[:, :, :3], w, 1e-5), (qkv, weight), dtype)
    compare("rms_norm", body, lambda x, w: ops.rms_norm(x[:, :, 3], w, 1e-5), (qkv, weight), dtype)


@pytest.mark.parametrize("body", BODIES)
def test_rms_norm_rounds_like_llama_and_like_gemma(body: str) -> None:
    need_body("rms_norm", body, torch.bfloat16)
    ops.configure({"rms_norm": body}, "cpu")
    x, weight = torch.randn(50, 96).bfloat16(), torch.randn(96).bfloat16()
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    llama = normed.bfloat16() * weight
    gemma = (normed * (1 + weight.float())).bfloat16()
    # A different order of sums may move a value that lies on the border between two bf16 numbers.
    assert (ops.rms_norm(x, weight, 1e-5) != llama).float().mean() < 1e-3
    assert (ops.rms_norm(x, weight, 1e-5, 1.0) != gemma).float().mean() < 1e-3


@pytest.mark.parametrize("body", BODIES)
def test_rms_norm_with_fp32_weight_beside_bf16(body: str) -> None:
    need_body("rms_norm", body, torch.bfloat16)
    ops.configure({"rms_norm": body}, "cpu")
    x = torch.randn(6, 40).bfloat16().requires_grad_()
    weight = torch.randn(40, requires_grad=True)
    y = ops.rms_norm(x, weight, 1e-5)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32
    assert relative_error(y, F.rms_norm(x.double(), (40,), weight.double(), 1e-5)) < 5e-3


def test_rms_norm_of_a_frozen_weight_computes_no_gradient_for_it() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8)
    y, rstd = torch.ops.megatune.rms_norm(x.detach(), weight, 1e-5, 0.0)
    assert torch.ops.megatune.rms_norm_backward(y, x.detach(), weight, rstd, 0.0, False)[1].numel() == 0
    low = [part.detach().bfloat16() for part in (y, x, weight)]
    assert torch.ops.megatune.rms_norm_backward(*low, rstd, 0.0, True)[1].dtype == torch.bfloat16
    ops.rms_norm(x, weight, 1e-5).sum().backward()
    assert weight.grad is None


def test_rms_norm_is_the_same_on_several_threads() -> None:
    x, weight = torch.randn(300, 128, requires_grad=True), torch.randn(128, requires_grad=True)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = ops.rms_norm(x, weight, 1e-5)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight))))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_layer_norm(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((9, 24), (24,), (24,)))
    truth = F.layer_norm(x.double(), (24,), weight.double(), bias.double(), 1e-5)
    assert relative_error(ops.layer_norm(x, weight, bias, 1e-5), truth) < 5e-3
    assert ops.layer_norm(x, weight.float(), None, 1e-5).dtype == dtype


def turned(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """All heads of [T, K, G, D], of which the last of each group is the key."""
    q, k = ops.rope(heads[:, :, :-1], heads[:, :, -1], cos, sin)
    return torch.cat((q, k.unsqueeze(2)), 2)


@pytest.mark.parametrize("shape", [(9, 1, 3, 64), (5, 2, 3, 34), (4, 1, 1, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("body", BODIES)
def test_rope(body: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    need_body("rope", body, dtype)
    cos, sin = angles(shape[0], shape[-1] // 2)
    compare("rope", body, lambda x: turned(x, cos, sin), (torch.randn(shape),), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("body", BODIES)
def test_rope_on_a_view_of_the_fused_projection_and_a_part_of_the_head(body: str, dtype: torch.dtype) -> None:
    need_body("rope", body, dtype)
    qkv = torch.randn(9, 2, 5, 32)
    cos, sin = angles(9, 11)
    compare("rope", body, lambda x: turned(x[:, :, :4], cos, sin), (qkv,), dtype)
    for rotated, x in zip(
        ops.rope(qkv[:, :, :3], qkv[:, :, 3], cos, sin), (qkv[:, :, :3], qkv[:, :, 3]), strict=True
    ):
        assert rotated.is_contiguous()
        assert torch.equal(rotated[..., 22:], x[..., 22:])


def test_rope_keeps_lengths_and_relative_angles() -> None:
    x, y = torch.randn(1, 1, 16), torch.randn(1, 1, 16)
    position = torch.arange(20)[:, None] * torch.rand(8)
    cos, sin = position.cos(), position.sin()
    a, b = ops.rope(x.expand(20, 1, 1, 16), y.expand(20, 1, 16), cos, sin)
    a = a.squeeze(2)
    torch.testing.assert_close(a.norm(dim=-1), x.norm(dim=-1).expand(20, 1))
    torch.testing.assert_close(
        (a[3:] * b[:-3]).sum(-1), (a[3] * b[0]).sum(-1).expand(17, 1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(9, 64), (3, 2 * 37), (1, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("body", BODIES)
def test_glu(body: str, dtype: torch.dtype, shape: tuple[int, int], activation: str) -> None:
    need_body("glu", body, dtype)
    compare("glu", body, lambda x: ops.glu(x, activation), (torch.randn(shape) * 3,), dtype)


@pytest.mark.parametrize("body", BODIES)
def test_glu_far_out_is_neither_nan_nor_infinite(body: str) -> None:
    need_body("glu", body, torch.float32)
    ops.configure({"glu": body}, "cpu")
    gate = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4])
    for activation, function in (("silu", F.silu), ("gelu", F.gelu), ("gelu_tanh", F.gelu)):
        gate_up = torch.stack((gate, torch.ones(7)), -1).flatten()[None].requires_grad_()
        y = ops.glu(gate_up, activation)
        (grad,) = torch.autograd.grad(y.sum(), gate_up)
        torch.testing.assert_close(y[0], function(gate), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(grad[0, ::2], (gate > 0).float() + 0.5 * (gate == 0), atol=1e-6, rtol=1e-6)


def test_glu_takes_rows_with_a_stride() -> None:
    wide = torch.randn(6, 40)
    torch.testing.assert_close(ops.glu(wide[:, 4:24], "silu"), ops.glu(wide[:, 4:24].contiguous(), "silu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("body", BODIES)
def test_no_tokens(body: str, dtype: torch.dtype) -> None:
    need_body("glu", body, dtype)
    ops.configure({"rms_norm": body, "rope": body, "glu": body}, "cpu")
    weight = torch.randn(8, dtype=dtype, requires_grad=True)
    x = torch.zeros(0, 8, dtype=dtype, requires_grad=True)
    cos, sin = angles(0, 4)
    y = ops.glu(
        turned(ops.rms_norm(x, weight, 1e-5).view(0, 1, 2, 4), cos[:, :2], sin[:, :2]).view(0, 8), "silu"
    )
    y.sum().backward()
    assert y.shape == (0, 4)
    assert x.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_gradcheck_of_the_references() -> None:
    x, weight = torch.randn(3, 6).double().requires_grad_(), torch.randn(6).double().requires_grad_()
    for offset in (0.0, 1.0):
        assert torch.autograd.gradcheck(lambda x, w, o=offset: ops.rms_norm(x, w, 1e-5, o), (x, weight))
    for activation in ("silu", "gelu", "gelu_tanh"):
        assert torch.autograd.gradcheck(lambda x, a=activation: ops.glu(x, a), (x,))
    cos, sin = angles(3, 1)
    assert torch.autograd.gradcheck(lambda x: turned(x.view(3, 1, 2, 3), cos, sin), (x,))


def test_wrong_arguments_are_named() -> None:
    x, weight = torch.randn(3, 6), torch.randn(6)
    (cos, sin), q = angles(3, 2), x.view(3, 1, 1, 6)
    for message, call in (
        ("rms_norm: .*weight", lambda: ops.rms_norm(x, torch.randn(5), 1e-5)),
        ("rms_norm: x", lambda: ops.rms_norm(x[0], weight, 1e-5)),
        ("rms_norm: weight is on meta", lambda: ops.rms_norm(x, weight.to("meta"), 1e-5)),
        ("rms_norm: x must be floating", lambda: ops.rms_norm(x.long(), weight, 1e-5)),
        ("layer_norm: weight", lambda: ops.layer_norm(x, torch.randn(5), None, 1e-5)),
        ("layer_norm: bias", lambda: ops.layer_norm(x, weight, torch.randn(5), 1e-5)),
        ("rope: cos", lambda: ops.rope(q, q[:, 0], cos.bfloat16(), sin.bfloat16())),
        ("rope: q", lambda: ops.rope(torch.randn(4, 1, 1, 6), q[:, 0], cos, sin)),
        ("rope: q", lambda: ops.rope(torch.randn(3, 1, 1, 2), q[:, 0], cos, sin)),
        ("rope: k", lambda: ops.rope(q, q, cos, sin)),
        ("rope: k", lambda: ops.rope(q, q[:, 0].double(), cos, sin)),
        ("glu: activation is 'relu'", lambda: ops.glu(x, "relu")),
        ("glu: gate_up", lambda: ops.glu(torch.randn(3, 5), "silu")),
    ):
        with pytest.raises(ValueError, match=message):
            call()
