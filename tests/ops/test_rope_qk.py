"""rope_qk with each of its bodies: norm and rotation of a packed product's heads, against fp64, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from megatune import ops
from tests.helpers.ops import compare, need_body
from tests.ops.bodies import DTYPES, QUICK, TOLERANCE, bodies, few, repeats_bitwise

# (groups, queries of each, width of a head, turned pairs): whole heads, a part of them, odd ones.
SHAPES = [(2, 3, 16, 8), (3, 2, 33, 4), (1, 1, 20, 7), (2, 4, 128, 64)]
WIDE = [(1, 2, 64, 32), (8, 4, 128, 64), (2, 2, 256, 128), (2, 1, 256, 64), (1, 3, 512, 256), (4, 8, 96, 48)]
WIDE += [(1, 41, 64, 32)]  # more heads of a group than a block has rows of threads for
NAMES = ("rope_qk", "rms_norm", "rope")


def angles(tokens: int, half: int) -> Tensor:
    return torch.randn(tokens, half, generator=torch.Generator().manual_seed(3)) * 50


def together(angle: Tensor, offset: float, view=lambda x: x):
    def run(qkv: Tensor, *weights: Tensor) -> Tensor:
        cos, sin = angle.cos().to(qkv.device), angle.sin().to(qkv.device)
        q, k, v = ops.rope_qk(view(qkv), cos, sin, *weights, eps=1e-5, offset=offset)
        return torch.cat((q, k.unsqueeze(2), v.unsqueeze(2)), 2)

    return run


def by_parts(angle: Tensor, offset: float):
    def run(qkv: Tensor, *weights: Tensor) -> Tensor:
        q, k, v = qkv.split((qkv.shape[2] - 2, 1, 1), 2)
        if weights:
            q, k = (ops.rms_norm(x, w, 1e-5, offset) for x, w in zip((q, k), weights, strict=True))
        q, k = ops.rope(q, k.squeeze(2), angle.cos(), angle.sin())
        return torch.cat((q, k.unsqueeze(2), v), 2)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("body", "device"), bodies("rope_qk"))
def test_heads(body: str, device: str, dtype: torch.dtype) -> None:
    need_body("rope_qk", body, dtype, device)
    for groups, queries, width, half in few(body, SHAPES + (WIDE if device == "cuda" else []), 1):
        tokens = 300 if device == "cuda" else 11
        qkv, angle = torch.randn(tokens, groups, queries + 2, width), angles(tokens, half)
        weights = tuple(1 + 0.1 * torch.randn(width) for _ in range(2))
        for inputs, offset in few(body, [((qkv,), 0.0), ((qkv, *weights), 1.0), ((qkv, *weights), 0.0)]):
            run = together(angle, offset)
            compare("rope_qk", body, run, inputs, dtype, device, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("body", "device"), bodies("rope_qk"))
def test_views(body: str, device: str, dtype: torch.dtype) -> None:
    need_body("rope_qk", body, dtype, device)
    inputs = torch.randn(9, 3, 7, 40), torch.randn(32), torch.randn(32)
    views = [
        lambda x: x[..., 3:35],  # rows begin at odd addresses
        lambda x: x[:, 1:, 2:, :32],
        lambda x: x[..., 8:],
        lambda x: x[:, :, ::2, 8:],
    ]
    for view in few(body, views, 1):
        run = together(angles(9, 16), 0.0, view)
        compare("rope_qk", body, run, inputs, dtype, device, tolerance=TOLERANCE[dtype])
        compare("rope_qk", body, run, inputs[:1], dtype, device, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_it_equals_its_parts_bit_by_bit(dtype: torch.dtype) -> None:
    qkv, angle = torch.randn(9, 2, 5, 32).to(dtype), angles(9, 16)
    for weights in ((), (torch.randn(32).to(dtype), torch.randn(32).to(dtype))):
        found = []
        for run in (together(angle, 0.0), by_parts(angle, 0.0)):
            leaves = [x.clone().requires_grad_() for x in (qkv, *weights)]
            y = run(*leaves)
            grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            found.append((y, *torch.autograd.grad(y, leaves, grad)))
        assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize(("body", "device"), bodies("rope_qk"))
def test_heads_that_a_kernel_has_no_room_for_and_no_tokens(body: str, device: str) -> None:
    need_body("rope_qk", body, torch.float32, device)
    inputs = torch.randn(5, 1, 3, 600), torch.randn(600), torch.randn(600)
    compare("rope_qk", body, together(angles(5, 8), 0.0), inputs, torch.float32, device)
    ops.configure({"rope_qk": body}, device)
    qkv = torch.zeros(0, 2, 4, 16, device=device, requires_grad=True)
    weight = torch.ones(16, device=device, requires_grad=True)
    y = together(angles(0, 8), 0.0)(qkv, weight, weight)
    y.sum().backward()
    assert y.shape == (0, 2, 4, 16)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_values_stay_where_they_are_and_nothing_is_kept_that_is_not_needed() -> None:
    qkv, angle = torch.randn(9, 2, 5, 32, requires_grad=True), angles(9, 16)
    weight = torch.ones(32, requires_grad=True)
    for weights in ((), (weight, weight)):
        q, _, v = ops.rope_qk(qkv, angle.cos(), angle.sin(), *weights)
        assert v.data_ptr() == qkv[:, :, -1].data_ptr()
        kept = [x for x in q.grad_fn.saved_tensors if x is not None]
        large = [x for x in kept if x.numel() > 9 * 16]
        assert [x.data_ptr() for x in large] == ([qkv.data_ptr()] if weights else [])


def test_one_graph_with_the_eager_gradients() -> None:
    angle, qkv, weight = angles(9, 16), torch.randn(9, 2, 5, 32), torch.randn(32)
    found = []
    run = together(angle, 0.0)
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (qkv, weight, weight)]
        y = function(*leaves)
        found.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    qkv, angle, weight = torch.randn(4, 2, 3, 8), torch.zeros(4, 4), torch.ones(8)
    for arguments, message in (
        ((qkv[0], angle, angle), "qkv .* must be"),
        ((qkv[:, :, :2], angle, angle), "qkv .* must be"),
        ((qkv, angle, angle[:3]), "cos .* and sin .* must both"),
        ((qkv, angle[:3], angle[:3]), r"cos .* must be \[T, dim/2\]"),
        ((qkv, torch.zeros(4, 5), torch.zeros(4, 5)), r"cos .* must be \[T, dim/2\]"),
        ((qkv, angle.bfloat16(), angle.bfloat16()), "cos .* must both be fp32"),
        ((qkv, angle, angle, weight), "q_weight and k_weight must both be given"),
        ((qkv, angle, angle, weight, weight[:4]), "k_weight .* must be as long as a head"),
        ((qkv, angle, angle, weight, weight.double()), "q_weight .* must have one dtype"),
        ((qkv.long(), angle, angle), "qkv must be floating point"),
    ):
        with pytest.raises(ValueError, match=f"rope_qk: {message}"):
            ops.rope_qk(*arguments)


def operator_calls(device: str):
    qkv, weight = torch.randn(6, 2, 5, 8, device=device), torch.randn(8, device=device)
    angle = torch.randn(6, 4, device=device)
    turn = angle.cos(), angle.sin()
    calls = torch.ops.megatune
    q, k, rstd = calls.rope_qk(qkv, *turn, weight, weight, 1e-5, 1.0)
    grads = q.flatten(1, 2), k, k
    yield calls.rope_qk, (qkv, *turn, None, None, 0.0, 0.0)
    yield calls.rope_qk, (qkv[:, :, 1:], *turn, weight, weight, 1e-5, 0.0)
    yield calls.rope_qk_backward, (*grads, *turn, None, None, None, None, 0.0, False)
    for weight_grad in (False, True):
        normed = qkv, weight, weight, rstd
        yield calls.rope_qk_backward, (*grads, *turn, *normed, 1.0, weight_grad)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device: str) -> None:
    if device == "cuda":
        need_body("rope_qk", "cuda", torch.float32, "cuda")
    for operator, arguments in operator_calls(device):
        assert set(opcheck(operator.default, arguments, test_utils=QUICK).values()) == {"SUCCESS"}


@pytest.mark.gpu
def test_repeats_are_equal_bit_by_bit() -> None:
    need_body("rope_qk", "cuda", torch.bfloat16, "cuda")
    calls = torch.ops.megatune
    qkv = torch.randn(3001, 4, 6, 128, device="cuda").bfloat16()
    weight, angle = torch.randn(128, device="cuda"), torch.randn(3001, 64, device="cuda")
    turn = angle.cos(), angle.sin()
    q, k, rstd = calls.rope_qk(qkv, *turn, weight, weight, 1e-5, 0.0)
    normed = qkv, weight, weight, rstd
    grads = torch.randn_like(q).flatten(1, 2), torch.randn_like(k), torch.randn_like(k)
    repeats_bitwise(lambda: calls.rope_qk_backward(*grads, *turn, *normed, 0.0, True))
