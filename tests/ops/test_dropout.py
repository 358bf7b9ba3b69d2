"""keyed_dropout with each of its bodies: the reference's mask, bit by bit, and gradients against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from megatune import ops
from tests.helpers.ops import compare, need_body
from tests.ops.bodies import DTYPES, QUICK, TOLERANCE, bodies, repeats_bitwise

# rows: as they come, scattered, more than 31 bits; p: few dropped, a half, all but few
ROWS = {"in order": lambda n: None, "far": lambda n: (torch.arange(n) * 7919 - 50) * 2**33 // 3}
SIZES = [(21, 8), (33, 64), (5, 129), (1, 7), (70, 264), (2, 2049)]


def in_fp64(x: Tensor, p: float, key: int, rows: Tensor | None, first_column: int) -> Tensor:
    ops.configure({"keyed_dropout": "reference"}, "cpu")
    return ops.keyed_dropout(x, p, key, rows, first_column)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("body", "device"), bodies("keyed_dropout"))
def test_sizes_views_and_gradients(body: str, device: str, dtype: torch.dtype) -> None:
    need_body("keyed_dropout", body, dtype, device)
    views = {
        "whole": lambda x: x,
        "aligned": lambda x: torch.cat((x, x), 1)[:, x.shape[1] :],
        "odd": lambda x: torch.cat((x, x[:, :1]), 1)[:, 1:],
        "every other": lambda x: x.repeat_interleave(2, 0)[::2],
        "columns": lambda x: x.t().contiguous().t(),
    }
    for rows, width in SIZES + ([(3000, 4096), (515, 1792)] if device == "cuda" else []):
        name, view = list(views.items())[(rows + width) % len(views)]
        for label, where in ROWS.items():
            names, p = where(rows), (0.1, 0.5, 0.93)[rows % 3]

            def run(x: Tensor, names=names, view=view, p=p) -> Tensor:
                there = None if names is None else names.to(x.device)
                return ops.keyed_dropout(view(x), p, 2**60 + 5, there, 40)

            try:
                compare(
                    "keyed_dropout",
                    body,
                    run,
                    (torch.randn(rows, width),),
                    dtype,
                    device,
                    tolerance=TOLERANCE[dtype],
                )
            except AssertionError as error:
                raise AssertionError(f"{rows} x {width}, {name}, rows {label}: {error}") from error


@pytest.mark.parametrize(("body", "device"), bodies("keyed_dropout"))
def test_the_same_elements_fall_out_with_every_body(body: str, device: str) -> None:
    need_body("keyed_dropout", body, torch.bfloat16, device)
    x = torch.randn(37, 333).bfloat16()
    x[0] = torch.inf  # what is dropped is 0 whatever it was
    far = (torch.arange(37) * 7919 - 50) * 2**33 // 3
    for p in (1e-12, 0.1, 0.5, 2**-16, 1 - 2**-40):  # a threshold of 0 and one of 2^31 among them
        for key, rows, first in ((1, None, 0), (-3, far, 77), (2**62 - 5, far, 2**33 + 1)):
            expected = in_fp64(x, p, key, rows, first)
            ops.configure({"keyed_dropout": body}, device)
            there = None if rows is None else rows.to(device)
            found = ops.keyed_dropout(x.to(device), p, key, there, first).cpu()
            assert torch.equal(found == 0, expected == 0)
            assert torch.equal(found, expected) or body == "compiled"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device: str) -> None:
    if device == "cuda":
        need_body("keyed_dropout", "cuda", torch.float32, "cuda")
    call = torch.ops.megatune.keyed_dropout.default
    x, rows = torch.randn(5, 24, device=device)[:, :20], torch.arange(5, device=device) * 3
    for arguments in ((x, rows, 5, 9, 40, 2**30, 2.0), (x[:0], None, 0, 0, 0, 1, 1.0)):
        assert set(opcheck(call, arguments, test_utils=QUICK).values()) == {"SUCCESS"}


@pytest.mark.gpu
def test_repeats_are_equal_and_wrong_operands_are_refused() -> None:
    need_body("keyed_dropout", "cuda", torch.bfloat16, "cuda")
    call, x = torch.ops.megatune.keyed_dropout, torch.randn(500, 1024, device="cuda").bfloat16()
    repeats_bitwise(lambda: (call(x, None, 1, 2, 0, 2**29, 1.25),))
    for arguments, message in (
        ((x.t(), None, 1, 2, 0, 5, 1.0), "x must be"),
        ((x, torch.arange(499, device="cuda"), 1, 2, 0, 5, 1.0), "rows must be contiguous int64"),
        ((x, torch.arange(500), 1, 2, 0, 5, 1.0), "all tensors must be on one CUDA device"),
        ((x, None, 2**31, 2, 0, 5, 1.0), "must be of 31 bits"),
        ((x.long(), None, 1, 2, 0, 5, 1.0), "takes float32, bfloat16 and float16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*arguments)
