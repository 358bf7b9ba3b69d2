"""Frozen weights in few bits: bitsandbytes' numbers, bodies alike, products and their gradients, bad input."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatune import ops
from megatune.ops import FrozenWeight, LoraLayout, quant, quantised_linear
from tests.helpers.ops import need_body
from tests.helpers.quant import CASES, golden_weight

GOLDEN = json.loads((Path(__file__).parent / "golden/quant.json").read_text())["cases"]
SHAPES = [(96, 192), (1, 64), (57, 96), (7, 90), (3, 33), (1, 1), (300, 64)]


@pytest.fixture(autouse=True)
def _automatic() -> None:
    yield
    ops.configure({}, "cpu")


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("body", ["reference", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_all_numbers_are_those_of_bitsandbytes(case: str, body: str) -> None:
    """`tools/make_quant_golden.py` says how the golden digests were made."""
    rows, columns, dtype = CASES[case]
    need_body("nf4_dequantise", body, torch.float32)
    ops.configure({"nf4_dequantise": "reference" if dtype == torch.float16 else body}, "cpu")
    weight = golden_weight(rows, columns, dtype)
    packed, scales, nested, offset = quant.quantise_nf4(weight)
    numbers, rowwise = quant.quantise_int8(weight)
    found = {
        "nf4 packed": packed,
        "nf4 scales": scales,
        "nf4 nested": nested,
        "nf4 offset": offset.view(1),
        "nf4 scales in fp32": quant.nf4_scales(scales, nested, offset),
        "nf4 dense": quant.dequantise_nf4(packed, scales, nested, offset, (rows, columns), dtype),
        "int8 numbers": numbers,
        "int8 scales": rowwise,
        "int8 dense": quant.dequantise_int8(numbers, rowwise, dtype),
        "nf4 code": torch.tensor(quant.NF4),
        "dynamic code": quant.dynamic_code(),
    }
    assert {name: digest(tensor) for name, tensor in found.items()} == GOLDEN[case]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bodies_are_equal_bit_for_bit(dtype: torch.dtype) -> None:
    need_body("nf4_dequantise", "cpu", dtype)
    for rows, columns in SHAPES:
        made = quant.quantise_nf4(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)))
        dense = []
        for body in ("cpu", "reference"):
            ops.configure({"nf4_dequantise": body}, "cpu")
            dense.append(quant.dequantise_nf4(*made, (rows, columns), dtype))
        assert dense[0].dtype == dtype and torch.equal(*dense)


@pytest.mark.parametrize("kind", quant.KINDS)
def test_rounding_is_within_half_a_step(kind: quant.Kind) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    frozen = FrozenWeight(kind, (64, 256), torch.float32)
    frozen.keep(weight)
    error = (frozen.dense(torch.float32) - weight).abs()
    if kind == "int8":
        assert (error <= weight.abs().amax(1, keepdim=True) * (0.5 / 127 + 2**-10)).all()
    else:  # the widest gap of the code is 0.304; scales are rounded too
        scales = weight.view(-1, 64).abs().amax(1, keepdim=True)
        assert (error.view(-1, 64) <= scales * 0.18).all() and error.mean() < 0.002


def test_zeros_and_odd_shapes_stay() -> None:
    for kind in quant.KINDS:
        for shape in SHAPES:
            frozen = FrozenWeight(kind, shape, torch.float32)
            frozen.keep(torch.zeros(shape))
            assert torch.equal(frozen.dense(torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", quant.KINDS)
@pytest.mark.parametrize("adapted", [False, True])
def test_product_and_gradients_are_those_of_the_dense_weight(kind: quant.Kind, adapted: bool) -> None:
    torch.manual_seed(0)
    frozen = FrozenWeight(kind, (48, 64), torch.float32)
    frozen.keep(torch.randn(48, 64))
    dense, bias = frozen.dense(torch.float32), torch.randn(48)
    x, a, b = (torch.randn(shape).requires_grad_() for shape in ((5, 64), (4, 64), (48, 4)))
    grad = torch.randn(5, 48)
    leaves = (x, a, b) if adapted else (x,)
    layout = LoraLayout.whole(48)
    out = (
        ops.lora_linear(x, frozen, bias, a, b, layout, 0.5) if adapted else quantised_linear(x, frozen, bias)
    )
    wanted = ops.lora_linear(x, dense, bias, a, b, layout, 0.5) if adapted else F.linear(x, dense, bias)
    assert torch.equal(out, wanted)
    found, expected = (torch.autograd.grad(result, leaves, grad) for result in (out, wanted))
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_nothing_dense_is_kept_for_backward() -> None:
    frozen = FrozenWeight("nf4", (48, 64), torch.float32)
    frozen.keep(torch.randn(48, 64))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = torch.randn(5, 64, requires_grad=True)
        quantised_linear(x, frozen)
        ops.lora_linear(x, frozen, None, torch.randn(4, 64), torch.randn(48, 4), LoraLayout.whole(48), 1.0)
    assert kept and all(t.numel() < 48 * 64 for t in kept)


def test_opcheck() -> None:
    packed, scales, nested, offset = quant.quantise_nf4(torch.randn(7, 90))
    args = (packed, quant.nf4_scales(scales, nested, offset), 7, 90)
    for dtype in (0, 1):
        torch.library.opcheck(torch.ops.megatune.nf4_dequantise.default, (*args, dtype))


def test_bad_input() -> None:
    made = quant.quantise_nf4(torch.randn(8, 64))
    cases = [
        (
            lambda: quant.quantise_nf4(torch.ones(2, 2, dtype=torch.int32)),
            "quantise_nf4: weight must be one of",
        ),
        (lambda: quant.quantise_int8(torch.ones(2)), r"quantise_int8: weight \(2,\) must be \[out, in\]"),
        (
            lambda: quant.quantise_int8(torch.full((1, 2), 1e6)),
            "quantise_int8: weight holds numbers that fp16",
        ),
        (lambda: quant.dequantise_nf4(*made, (8, 65), torch.float32), "dequantise_nf4: packed must be"),
        (lambda: quant.dequantise_nf4(*made, (8, 64), torch.float64), "dequantise_nf4: dtype must be one of"),
        (
            lambda: quant.dequantise_nf4(made[0].char(), *made[1:], (8, 64), torch.float32),
            "dequantise_nf4: packed must be contiguous torch.uint8",
        ),
        (
            lambda: quant.dequantise_nf4(made[0], made[1], made[2].double(), made[3], (8, 64), torch.float32),
            "dequantise_nf4: nested must be contiguous torch.float32",
        ),
        (
            lambda: quant.dequantise_int8(torch.ones(2, 2), torch.ones(2), torch.float32),
            "dequantise_int8: numbers torch.float32",
        ),
        (
            lambda: quant.dequantise_int8(torch.ones(2, 2, dtype=torch.int8), torch.ones(3), torch.float32),
            r"dequantise_int8: scales torch.float32 \(3,\) must be fp32 \[2\]",
        ),
        (lambda: FrozenWeight("fp4", (2, 2), torch.float32), "FrozenWeight: kind is 'fp4'"),
        (lambda: FrozenWeight("nf4", (2, 2), torch.float32).keep(torch.ones(2, 3)), "must be \\(2, 2\\)"),
        (
            lambda: quantised_linear(torch.ones(2, 3), FrozenWeight("int8", (2, 2), torch.float32)),
            r"quantised_linear: x \(2, 3\) must be \[T, 2\]",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_against_bitsandbytes_itself() -> None:
    """Where it is installed: large weights, its public functions."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = (torch.randn(512, 2048, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
        packed, scales, nested, offset = quant.quantise_nf4(weight)
        theirs, state = functional.quantize_4bit(
            weight, compress_statistics=True, quant_type="nf4", blocksize=64
        )
        assert torch.equal(packed, theirs.view(-1)) and torch.equal(nested, state.state2.absmax)
        assert torch.equal(offset, state.offset)
        # Its CPU kernel for scales looks them up in a coarse table: some become the second nearest.
        steps = (scales.int() - state.absmax.int()).abs()
        assert steps.max() <= 1 and steps.float().mean() < 0.01
        mine = quant.dequantise_nf4(theirs.view(-1), state.absmax, nested, offset, (512, 2048), dtype)
        assert torch.equal(mine, functional.dequantize_4bit(theirs, state))
        numbers, rowwise = quant.quantise_int8(weight)
        wanted, wanted_rows, _ = functional.int8_vectorwise_quant(weight.half())
        assert torch.equal(numbers, wanted) and torch.equal(rowwise, wanted_rows)
        dense = functional.int8_vectorwise_dequant(wanted, wanted_rows)
        assert torch.equal(quant.dequantise_int8(numbers, rowwise, torch.float32), dense)
