"""Weights in 4 and 8 bits made dense by each body: the reference's bits, at odd sizes and odd addresses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from megatune import ops
from megatune.ops import quant
from tests.helpers.ops import need_body
from tests.ops.bodies import DTYPES, QUICK, bodies, repeats_bitwise

# One number; less than a block; blocks and a part, odd and even; a part beside a warp's 1024 numbers, two whole warps;
# more than the 16384 numbers that share the scale of their scales.
SHAPES = [(0, 5), (1, 1), (3, 21), (7, 90), (1, 2047), (32, 64), (3, 683), (33, 512), (301, 67)]
# A row longer than what one block of the kernel takes; whole vectors of 16 and of 8 bytes.
INT8_SHAPES = [(0, 8), (5, 0), (1, 1), (7, 90), (9, 8), (6, 12), (2, 4104), (3, 9001)]


def poisoned(function, *args) -> Tensor:
    """function(..), every new tensor filled with the largest number or NaN first."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return function(*args)
    finally:
        torch.use_deterministic_algorithms(False)


def nf4_parts(rows: int, columns: int) -> tuple[Tensor, ...]:
    """Any codes and scales, not only those that a weight has: every value of each is there."""
    seed = torch.Generator().manual_seed(rows * 1000 + columns)
    blocks = -(-rows * columns // quant.BLOCK)
    packed, scales = (
        torch.randint(256, (count,), generator=seed, dtype=torch.uint8)
        for count in (-(-rows * columns // 2), blocks)
    )
    nested = torch.rand(-(-blocks // quant.NESTED), generator=seed) * 0.1
    return packed, scales, nested, torch.tensor(0.037)


def same_bits(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype and torch.equal(found.cpu(), wanted)
    assert torch.equal(found.cpu().signbit(), wanted.signbit())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("body", "device"), [one for one in bodies("nf4_dequantise") if one.id != "reference-cpu"]
)
def test_nf4_is_the_reference_bit_for_bit(body: str, device: str, dtype: torch.dtype) -> None:
    need_body("nf4_dequantise", body, dtype, device)
    for shape in SHAPES + ([(4096, 4099)] if device == "cuda" else []):
        parts = nf4_parts(*shape)
        ops.configure({"nf4_dequantise": "reference"}, "cpu")
        wanted = quant.dequantise_nf4(*parts, shape, dtype)
        ops.configure({"nf4_dequantise": body}, device)
        here = [part.to(device) for part in parts]
        same_bits(poisoned(quant.dequantise_nf4, *here, shape, dtype), wanted)
        # Codes at an address where no word can be loaded.
        moved = torch.cat((here[0].new_zeros(1), here[0]))[1:]
        same_bits(poisoned(quant.dequantise_nf4, moved, *here[1:], shape, dtype), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "body", [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "reference")]
)
def test_int8_is_the_reference_bit_for_bit(body: str, dtype: torch.dtype) -> None:
    need_body("int8_dequantise", body, dtype, "cuda")
    ops.configure({"int8_dequantise": body}, "cuda")
    seed = torch.Generator().manual_seed(3)
    for rows, columns in [*INT8_SHAPES, (70001, 16)]:
        numbers = torch.randint(-127, 128, (rows, columns), generator=seed, dtype=torch.int8)
        scales = torch.rand(rows, generator=seed)
        wanted = quant.dequantise_int8(numbers, scales, dtype)
        same_bits(poisoned(quant.dequantise_int8, numbers.cuda(), scales.cuda(), dtype), wanted)
        moved = torch.cat((numbers.flatten().new_zeros(1), numbers.flatten())).cuda()[1:].view(rows, columns)
        same_bits(poisoned(quant.dequantise_int8, moved, scales.cuda(), dtype), wanted)


@pytest.mark.gpu
def test_a_weight_beyond_32_bits() -> None:
    """Its last numbers are those of a small one with the same codes."""
    need_body("nf4_dequantise", "cuda", torch.bfloat16, "cuda")
    ops.configure({"nf4_dequantise": "cuda"}, "cuda")
    rows, columns = 2**15 + 1, 2**16  # 2^31 numbers and one row more
    blocks = rows * columns // quant.BLOCK
    seed = torch.Generator(device="cuda").manual_seed(0)
    packed, scales = (
        torch.randint(256, (count,), generator=seed, dtype=torch.uint8, device="cuda")
        for count in (rows * columns // 2, blocks)
    )
    nested = torch.rand(-(-blocks // quant.NESTED), generator=seed, device="cuda")
    offset = torch.tensor(0.5, device="cuda")
    found = quant.dequantise_nf4(packed, scales, nested, offset, (rows, columns), torch.bfloat16)[-2:]
    last = packed[-columns:], scales[-2 * columns // quant.BLOCK :]
    first = (rows - 2) * columns // quant.BLOCK // quant.NESTED
    wanted = quant.dequantise_nf4(
        *(part.cpu() for part in (*last, nested[first:], offset)), (2, columns), torch.bfloat16
    )
    same_bits(found, wanted)


@pytest.mark.gpu
def test_repeats_on_a_gpu() -> None:
    need_body("nf4_dequantise", "cuda", torch.bfloat16, "cuda")
    code = quant.dynamic_code().cuda()
    parts = [part.cuda() for part in nf4_parts(301, 67)]
    numbers = torch.randint(-127, 128, (70, 90), dtype=torch.int8, device="cuda")
    scales = torch.rand(70, device="cuda")
    calls = torch.ops.megatune
    repeats_bitwise(
        lambda: (calls.nf4_dense(*parts, code, 301, 67, 1), calls.int8_dense(numbers, scales, 0.1, 2))
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device: str) -> None:
    calls = torch.ops.megatune
    parts = [part.to(device) for part in (*nf4_parts(7, 90), quant.dynamic_code())]
    numbers = torch.ones(3, 5, dtype=torch.int8, device=device)
    for operator, arguments in (
        (calls.nf4_dense, (*parts, 7, 90, 1)),
        (calls.int8_dense, (numbers, torch.ones(3, device=device), 0.5, 2)),
    ):
        assert set(opcheck(operator.default, arguments, test_utils=QUICK).values()) == {"SUCCESS"}


@pytest.mark.gpu
def test_what_the_kernels_cannot_read_is_an_error() -> None:
    need_body("nf4_dequantise", "cuda", torch.bfloat16, "cuda")
    parts = [part.cuda() for part in (*nf4_parts(7, 90), quant.dynamic_code())]
    numbers, scales = torch.ones(3, 5, dtype=torch.int8, device="cuda"), torch.ones(3, device="cuda")
    cases = [
        (lambda: torch.ops.megatune.nf4_dense(*parts, 7, 200, 0), "nf4_dense: packed must be"),
        (lambda: torch.ops.megatune.nf4_dense(*parts[:4], parts[4][1:], 7, 90, 0), "nf4_dense: code must be"),
        (lambda: torch.ops.megatune.nf4_dense(*parts, 7, 90, 3), "nf4_dense: the CUDA body gives"),
        (lambda: torch.ops.megatune.int8_dense(numbers.t(), scales, 1.0, 0), "int8_dense: numbers must be"),
        (lambda: torch.ops.megatune.int8_dense(numbers, scales[1:], 1.0, 0), "int8_dense: scales must be"),
    ]
    for call, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call()
