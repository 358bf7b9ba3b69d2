"""Quantising to fp8 and linear layers in fp8: numbers, scales and layouts; fused and not; gradients against fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from megatune import ops
from megatune.ops import Fp8Recipe, fp8
from megatune.ops.fp8_quantise import (
    ROWS,
    SCALINGS,
    TRANSPOSED,
    Quantised,
    format_of,
    quantise,
    quantise_glu,
    quantise_rms_norm,
)
from tests.helpers.ops import need_body, relative_error
from tests.ops.bodies import DTYPES, bodies, repeats_bitwise

RECIPES = [
    Fp8Recipe(),
    Fp8Recipe("blockwise"),
    Fp8Recipe(gradients="e5m2", fast_gradients=False),
    Fp8Recipe("blockwise", wgrad="bf16"),
]
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
CASES = [("rowwise", False), ("rowwise", True), ("blocks", False), ("tiles", False), ("mixed", False)]


def exact_bodies(op: str) -> list:
    """Those of which every bit is promised."""
    return [body for body in bodies(op) if body.id in ("reference-cpu", "reference-cuda", "cuda-cuda")]


def poisoned(function, *args, **more):
    """function(..), every new tensor filled with the largest number or NaN first."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return function(*args, **more)
    finally:
        torch.use_deterministic_algorithms(False)


def same(one: Quantised, two: Quantised) -> None:
    """Equal bit by bit; any NaN is like any other."""
    for name in ("codes", "codes_t"):
        left, right = (getattr(x, name).view(format_of(x.e5m2)).float().cpu() for x in (one, two))
        assert torch.equal(left.nan_to_num(nan=1e9), right.nan_to_num(nan=1e9)), name
        signs = [getattr(x, name).cpu()[~left.isnan()] for x in (one, two)]
        assert torch.equal(*signs), name
    assert torch.equal(one.scales.cpu(), two.scales.cpu()) and torch.equal(
        one.scales_t.cpu(), two.scales_t.cpu()
    )


def wild(rows: int, width: int) -> Tensor:
    """Rows and columns of many magnitudes, a row and a column of zeros, a number that is the smallest there is."""
    x = torch.randn(rows, width) * torch.randn(rows, 1).mul(3).exp() * torch.randn(width).exp()
    x[min(3, rows - 1)] = 0.0
    x[:, 5] = 0.0
    x[0, 0] = 1e-45
    return x


@pytest.mark.parametrize(("scaling", "e5m2"), CASES)
def test_each_number_is_the_nearest_under_its_scale(scaling: str, e5m2: bool) -> None:
    x = wild(130, 256)
    made = quantise(x, scaling, e5m2=e5m2)
    steps, smallest, largest = (2, 2.0**-17, 57344.0) if e5m2 else (3, 2.0**-10, 448.0)
    for factor, truth in ((made.plain, x), (made.transposed, x.t())):
        dense = factor.dense()[: truth.shape[0], : truth.shape[1]]
        if scaling == "rowwise":
            groups = truth.abs().amax(1, keepdim=True).expand_as(truth)
            peaks = factor.codes.view(format_of(e5m2)).float().abs().amax(1)[: truth.shape[0]]
            assert torch.equal(peaks, torch.where(groups[:, 0] > 0, largest, 0))
        else:
            padded = torch.zeros_like(factor.dense())
            padded[: truth.shape[0], : truth.shape[1]] = truth
            height = 1 if factor.scaling == "blocks" else 128
            cut = padded.abs().unflatten(1, (-1, 128)).unflatten(0, (-1, height)).amax((1, 3))
            groups = cut.repeat_interleave(height, 0).repeat_interleave(128, 1)[
                : truth.shape[0], : truth.shape[1]
            ]
        bound = torch.maximum(truth.abs() * 2.0 ** -(steps + 1), groups / largest * smallest) * 1.0001
        assert ((dense - truth).abs() <= bound + 1e-44).all()
        assert (factor.dense()[truth.shape[0] :] == 0).all() and (
            factor.dense()[:, truth.shape[1] :] == 0
        ).all()


@pytest.mark.parametrize(("body", "device"), exact_bodies("fp8_quantise"))
def test_what_is_not_finite_stays_so_and_zeros_have_scale_one(body: str, device: str) -> None:
    need_body("fp8_quantise", body, torch.float32, device)
    ops.configure({"fp8_quantise": body}, device)
    x = torch.full((6, 128), 1000.0, device=device)
    x[1, 7], x[2, 9], x[3] = float("nan"), float("-inf"), 0.0
    x[4] = 2.0**-120
    for scaling in ("rowwise", "blocks"):
        plain = quantise(x, scaling).plain
        dense = plain.dense()[:6]
        scales = plain.scales.flatten()[:6]
        assert dense[1, 7].isnan() and dense[0, 7] == dense[1, 8] == dense[0, 8]
        assert dense[1].isnan().sum() == 1
        assert dense[2].isnan().all()
        assert (dense[3] == 0).all() and scales[3] == 1 and scales[4] == 1
        torch.testing.assert_close(dense[0], x[0], rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_kernels_are_the_reference_bit_by_bit(scaling: str, dtype: torch.dtype) -> None:
    need_body("fp8_quantise", "cuda", dtype, "cuda")
    for rows, width in ((1, 128), (77, 384), (128, 128), (300, 640), (5, 17408), (700, 1024), (3, 34816)):
        width -= 112 if scaling == "rowwise" else 0
        x = wild(rows, width).to("cuda", dtype)
        wide = torch.cat((x, x), 1)
        for view in (x, wide[:, :width], torch.cat((x[:, :1], x), 1)[:, 1:], x.t().contiguous().t()):
            for e5m2 in (False, True) if scaling == "rowwise" else (False,):
                ops.configure({"fp8_quantise": "cuda"}, "cuda")
                made = poisoned(quantise, view, scaling, e5m2=e5m2)
                halves = [quantise(view, scaling, e5m2=e5m2, copies=copies) for copies in (ROWS, TRANSPOSED)]
                ops.configure({"fp8_quantise": "reference"}, "cuda")
                expected = quantise(x, scaling, e5m2=e5m2)
                same(made, expected)
                one = Quantised(
                    rows,
                    scaling,
                    e5m2,
                    *(halves[0].codes, halves[0].scales, halves[1].codes_t, halves[1].scales_t),
                )
                same(one, expected)
                assert halves[0].codes_t.numel() == 0 and halves[1].codes.numel() == 0


def checked(op: str, body: str, device: str, dtype: torch.dtype, plain: str) -> None:
    need_body(op, body, dtype, device)
    ops.configure({op: body, plain: "reference", "fp8_quantise": "reference"}, device)


def norm_is_right(x: Tensor, weight: Tensor, offset: float, scaling: str) -> None:
    made, rstd = poisoned(quantise_rms_norm, x, weight, 1e-5, offset, scaling)
    truth = torch.rsqrt(x.double().square().mean(1) + 1e-5)
    assert relative_error(rstd.nan_to_num(), truth.nan_to_num()) < 1e-6
    y = x.float() * rstd.unsqueeze(1)
    y = y.to(x.dtype) * weight if offset == 0.0 else (y * (offset + weight.float())).to(x.dtype)
    same(made, quantise(y, scaling))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("body", "device"), exact_bodies("fp8_rms_norm"))
def test_norms_to_fp8(body: str, device: str, dtype: torch.dtype) -> None:
    checked("fp8_rms_norm", body, device, dtype, "rms_norm")
    weight = (torch.randn(384) + 1).to(device, dtype)
    for rows, view in ((50, lambda x: x[:, :384]), (131, lambda x: x[:, 1:385])):
        for scaling in ("rowwise", "blocks"):
            for offset in (0.0, 1.0):
                norm_is_right(view(wild(rows, 400).to(device, dtype)), weight, offset, scaling)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_to_fp8_of_many_rows(dtype: torch.dtype) -> None:
    """Enough for the kernels that read each value once: blocks without a tile, tiles that rows do not fill."""
    checked("fp8_rms_norm", "cuda", "cuda", dtype, "rms_norm")
    for rows, width in ((7000, 640), (2300, 2048), (2000, 2304), (600, 7552), (600, 16384)):
        x, weight = wild(rows, width + 8).to("cuda", dtype), (torch.randn(width) + 1).to("cuda", dtype)
        x[rows // 2, 7] = float("nan")
        for view, offset in ((x[:, :width], 0.0), (x[:, 8:], 1.0)):
            norm_is_right(view, weight, offset, "blocks")
    x, weight = torch.randn(1000, 8192, device="cuda").to(dtype), torch.randn(8192, device="cuda").to(dtype)
    repeats_bitwise(lambda: torch.ops.megatune.fp8_rms_norm(x, weight, 1e-5, 0.0, 1, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_rows_that_warps_share_and_of_many_rows(dtype: torch.dtype) -> None:
    checked("fp8_rms_norm", "cuda", "cuda", dtype, "rms_norm")
    for rows, width in ((1, 16), (5000, 144), (1200, 2064), (300, 8192), (9, 17424), (0, 128)):
        x = wild(max(rows, 4), width)[:rows].to("cuda", dtype)
        weight = torch.randn(width, device="cuda").to(dtype)
        weight[2] = float("nan")
        made, rstd = poisoned(quantise_rms_norm, x, weight, 1e-5, 0.0, "rowwise")
        assert relative_error(rstd, torch.rsqrt(x.double().square().mean(1) + 1e-5)) < 1e-6
        same(made, quantise((x.float() * rstd.unsqueeze(1)).to(dtype) * weight, "rowwise"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("body", "device"), exact_bodies("fp8_glu"))
def test_gated_units_to_fp8(body: str, device: str, dtype: torch.dtype) -> None:
    checked("fp8_glu", body, device, dtype, "glu")
    if body == "cuda":
        ops.configure({"fp8_glu": body, "glu": "cuda", "fp8_quantise": "reference"}, device)
    for activation in ("silu", "gelu", "gelu_tanh"):
        for rows, width, first in ((50, 256, 0), (131, 128, 1)):
            gate_up = torch.randn(rows, 2 * width + 8, dtype=torch.float32).mul(2).to(device, dtype)
            gate_up = gate_up[:, first : first + 2 * width]
            for scaling in ("rowwise", "blocks"):
                made = poisoned(quantise_glu, gate_up, activation, scaling)
                same(made, quantise(ops.glu(gate_up, activation), scaling))


def layers(recipe: Fp8Recipe, x: Tensor, scale: Tensor, weight: Tensor, gate_up: Tensor, bias: Tensor):
    """(what is computed in fp8, the same in plain torch, its inputs)"""

    def norm(x: Tensor, scale: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5) * scale

    def glu(gate_up: Tensor) -> Tensor:
        return torch.nn.functional.silu(gate_up[:, ::2]) * gate_up[:, 1::2]

    return [
        (
            lambda x, w, b: ops.fp8_linear(x, w, b, recipe),
            lambda x, w, b: x @ w.t() + b,
            (x, weight, bias),
        ),
        (
            lambda x, s, w: ops.fp8_norm_linear(x, s, 1e-5, w, recipe=recipe),
            lambda x, s, w: norm(x, s) @ w.t(),
            (x, scale, weight),
        ),
        (
            lambda x, r, s, w: torch.cat(ops.fp8_add_norm_linear(x, r, s, 1e-5, w, recipe=recipe), 1),
            lambda x, r, s, w: torch.cat((x + r, norm(x + r, s) @ w.t()), 1),
            (x, x.flip(0), scale, weight),
        ),
        (
            lambda x, w: ops.fp8_glu_linear(x, "silu", w, recipe=recipe),
            lambda x, w: glu(x) @ w.t(),
            (gate_up, weight),
        ),
    ]


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_outputs_and_gradients(recipe: Fp8Recipe, device: str) -> None:
    # Each factor of a product is rounded by up to 2^-4 of itself (e5m2: 2^-3), about 2.7 % (5.3 %) in the mean.
    limit = 0.075 if recipe.gradients == "e5m2" else 0.045
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tensors = (
        torch.randn(45, 256),
        torch.randn(256),
        torch.randn(384, 256) / 16,
        torch.randn(45, 512),
        torch.randn(384),
    )
    for in_fp8, plain, inputs in layers(recipe, *(tensor.to(device, dtype) for tensor in tensors)):
        leaves = [x.detach().requires_grad_() for x in inputs]
        wide = [x.detach().double().requires_grad_() for x in inputs]
        y, truth = in_fp8(*leaves), plain(*wide)
        grad = torch.randn_like(y)
        results = (y, *torch.autograd.grad(y, leaves, grad))
        expected = (truth, *torch.autograd.grad(truth, wide, grad.double()))
        for number, (result, want) in enumerate(zip(results, expected, strict=True)):
            assert result.dtype == dtype
            exact = recipe.wgrad == "bf16" and want.shape == (384, 256)
            most = limit if not exact else 1e-5 if device == "cpu" else 1e-2
            assert relative_error(result, want) < most, number
        # What needs no gradient is not computed, and changes nothing.
        leaves[-1].requires_grad_(False)
        (first,) = torch.autograd.grad(in_fp8(*leaves), leaves[:1], grad)
        assert relative_error(first, results[1]) < 1e-5


def test_in_blocks_the_weights_gradient_has_a_scale_for_128_x_128_of_the_gradient() -> None:
    x, weight = torch.randn(200, 128).requires_grad_(), torch.randn(256, 128).requires_grad_()
    grad = torch.randn(200, 256)
    y = ops.fp8_linear(x, weight, recipe=Fp8Recipe("blockwise"))
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
    of_tiles = (
        quantise(grad, "tiles").transposed.dense() @ quantise(x.detach(), "blocks").transposed.dense().t()
    )
    of_blocks = (
        quantise(grad, "blocks").plain.dense() @ quantise(weight.detach(), "tiles").transposed.dense().t()
    )
    assert relative_error(grad_weight, of_tiles) < 1e-6
    assert relative_error(grad_x, of_blocks[:200]) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("inner", [128, 640, 2048, 16384])
def test_products_on_a_gpu_are_those_of_the_numbers(inner: int) -> None:
    if fp8.products_problem():
        pytest.skip(fp8.products_problem())
    a, b = torch.randn(256, inner, device="cuda"), torch.randn(384, inner, device="cuda")
    kinds = [("rowwise", "rowwise", False), ("rowwise", "rowwise", True)]
    kinds += (
        [("blocks", "tiles", False), ("tiles", "blocks", False)] if "blockwise" in ops.fp8_products() else []
    )
    for left, right, e5m2 in kinds:
        factors = quantise(a, left, e5m2=e5m2).plain, quantise(b, right).plain
        for fast in (False, True):
            made = fp8._scaled_mm(*factors, torch.bfloat16, fast)
            truth = factors[0].dense().double() @ factors[1].dense().double().t()
            # Fast sums of many numbers are what Fp8Recipe.fast_gradients says of them.
            limit = 0.03 if fast and inner > 2048 else 6e-3
            assert relative_error(made, truth) < limit, (left, right, e5m2, fast)


@pytest.mark.gpu
def test_repeats_and_opcheck_on_a_gpu() -> None:
    need_body("fp8_quantise", "cuda", torch.bfloat16, "cuda")
    calls = torch.ops.megatune
    x, weight = torch.randn(700, 1024, device="cuda").bfloat16(), torch.randn(1024, device="cuda").bfloat16()
    repeats_bitwise(
        lambda: (*calls.fp8_quantise(x, 0, False, 3), *calls.fp8_rms_norm(x, weight, 1e-5, 0.0, 0, 3))
    )
    for operator, arguments in operator_calls("cuda"):
        assert set(opcheck(operator.default, arguments).values()) == {"SUCCESS"}


def operator_calls(device: str):
    calls = torch.ops.megatune
    x, weight = torch.randn(21, 256, device=device), torch.randn(256, device=device)
    yield calls.fp8_quantise, (x, 2, False, 3)
    yield calls.fp8_quantise, (x, 3, False, 3)
    yield calls.fp8_quantise, (x[:, 1:17], 0, True, 2)
    yield calls.fp8_rms_norm, (x, weight, 1e-5, 0.0, 1, 3)
    yield calls.fp8_glu, (x, 0, 0, 1)


def test_opcheck() -> None:
    for operator, arguments in operator_calls("cpu"):
        tests = ("test_schema", "test_faketensor")
        assert set(opcheck(operator.default, arguments, test_utils=tests).values()) == {"SUCCESS"}


def test_products_are_of_the_numbers_that_the_codes_stand_for() -> None:
    x, weight = torch.randn(20, 256), torch.randn(128, 256)
    factors = quantise(x, "blocks").plain, quantise(weight, "tiles").plain
    truth = factors[0].dense().double() @ factors[1].dense().double().t()
    y = ops.fp8_linear(x, weight, recipe=Fp8Recipe("blockwise"))
    assert relative_error(y, truth[:20]) < 1e-6


@pytest.mark.parametrize(
    ("recipe", "gradients"), [(Fp8Recipe(), True), (Fp8Recipe(fast_gradients=False), False)]
)
def test_products_of_gradients_are_added_up_as_the_recipe_says(recipe, gradients, monkeypatch) -> None:
    body, seen = ops.OPS["fp8_mm"].bodies["reference"], []
    spy = replace(body, run=(lambda *args: seen.append(args[3]) or body.run[0](*args),))
    monkeypatch.setitem(ops.OPS["fp8_mm"].bodies, "reference", spy)
    x, weight = torch.randn(16, 32).requires_grad_(), torch.randn(48, 32).requires_grad_()
    ops.fp8_linear(x, weight, recipe=recipe).sum().backward()
    assert seen == [True, gradients, gradients]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: quantise(x[:, :24], "rowwise"), "fp8_quantise: x .* multiple of 16 with rowwise"),
        (lambda x, w: quantise(x, "blocks"), "fp8_quantise: x .* multiple of 128 with blocks"),
        (lambda x, w: quantise(x, "columns"), "fp8_quantise: scaling is 'columns', must be one of"),
        (lambda x, w: quantise(x.double(), "rowwise"), "fp8_quantise: x must be fp32, bf16 or fp16"),
        (lambda x, w: quantise(x.repeat(1, 4), "tiles", e5m2=True), "fp8_quantise: e5m2 goes with rowwise"),
        (lambda x, w: quantise(x, "rowwise", copies=0), "fp8_quantise: copies is 0"),
        (
            lambda x, w: quantise_rms_norm(x, w[0, :16], 1e-5, 0.0, "rowwise"),
            "fp8_rms_norm: weight .* must be",
        ),
        (lambda x, w: quantise_glu(x, "relu", "rowwise"), "fp8_glu: activation is 'relu'"),
        (lambda x, w: quantise_glu(x.repeat(1, 8), "silu", "tiles"), "fp8_glu: scaling is 'tiles'"),
        (lambda x, w: quantise(x.repeat(1, 4), "mixed", e5m2=True), "fp8_quantise: e5m2 goes with rowwise"),
        (lambda x, w: ops.fp8_linear(x, w[:, :16]), r"fp8_linear: weight \(16, 16\) must be \[out, 32\]"),
        (lambda x, w: ops.fp8_linear(x, w[:8]), r"fp8_linear: weight \(8, 32\) must have outputs"),
        (lambda x, w: ops.fp8_linear(x, w, w[0, :5]), r"fp8_linear: bias \(5,\) must be \[16\]"),
        (lambda x, w: ops.fp8_linear(x, w, recipe=Fp8Recipe("blockwise")), "multiple of 128 with blocks"),
        (lambda x, w: ops.fp8_linear(x, w.to("meta")), "fp8_linear: weight is on meta"),
        (
            lambda x, w: ops.fp8_norm_linear(x, w[0, :3], 1e-5, w, recipe=Fp8Recipe()),
            "fp8_norm_linear: scale",
        ),
        (
            lambda x, w: ops.fp8_add_norm_linear(x, x[:2], w[0], 1e-5, w, recipe=Fp8Recipe()),
            r"fp8_add_norm_linear: residual torch.float32 \(2, 32\) must be like x",
        ),
        (
            lambda x, w: ops.fp8_glu_linear(x, "silu", w, recipe=Fp8Recipe()),
            r"fp8_glu_linear: weight \(16, 32\) must be \[out, 16\]",
        ),
        (lambda x, w: Fp8Recipe("tilewise"), "Fp8Recipe: scaling is 'tilewise'"),
        (lambda x, w: Fp8Recipe("blockwise", "e5m2"), "Fp8Recipe: gradients in e5m2 go with rowwise"),
    ],
)
def test_what_does_not_fit_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 32), torch.randn(16, 32))
