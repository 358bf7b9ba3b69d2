"""Which bodies of an op the tests of this folder run, and where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import pytest
import torch

from megatune import ops

T = TypeVar("T")

# Relative error (of norms) against fp64, on the same rounded inputs.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}
DTYPES = list(TOLERANCE)
# What opcheck looks at of operators without autograd of their own: the rest traces them, half a second each.
QUICK = ("test_schema", "test_faketensor")


def bodies(op: str) -> list:
    """(body, device) of all bodies of an op; those on a GPU are chosen by `-m gpu`."""
    known = ops.OPS[op].bodies
    here = [pytest.param(name, "cpu", id=f"{name}-cpu") for name in ("reference", "cpu") if name in known]
    there = [name for name, body in known.items() if body.devices is None or "cuda" in body.devices]
    return here + [pytest.param(name, "cuda", id=f"{name}-cuda", marks=pytest.mark.gpu) for name in there]


def few(body: str, kinds: Sequence[T], some: int = 2) -> Sequence[T]:
    """All kinds of inputs; for "compiled" the first `some`. torch.compile takes seconds for each, all of them for
    formulas in Python that the reference has, too; what differs from it must be among the first."""
    return kinds[:some] if body == "compiled" else kinds


def repeats_bitwise(run, times: int = 100) -> None:
    """run() gives tensors; the same bits each time."""
    first = [x.clone() for x in run()]
    for _ in range(times - 1):
        for one, two in zip(first, run(), strict=True):
            assert torch.equal(one, two)
