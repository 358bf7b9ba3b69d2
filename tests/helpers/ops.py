"""Running one op with each of its bodies, against the reference in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from megatune import ops

DTYPES = [torch.float32, torch.bfloat16]
# Relative error (of norms) against fp64, on the same rounded inputs: a few fp32 rounding steps; one or two bf16 ones.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3}


def need_body(
    op: str, body: str, dtype: torch.dtype, device: str = "cpu", features: tuple[str, ...] = ()
) -> None:
    """Skips the test where this machine cannot run that body, with the reason."""
    reason = ops.OPS[op].bodies[body].unfit(device, dtype, features)
    if reason is not None:
        pytest.skip(f"{op} {body}: {reason}")


def relative_error(value: Tensor, truth: Tensor) -> float:
    value = value.detach().double()
    truth = truth.detach().to(value.device).double()
    return ((value - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def run(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor]:
    """[output, gradients of the inputs] of function(*inputs) in dtype, for a gradient that is always the same."""
    leaves = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
    output = function(*leaves)
    seed = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=seed, dtype=torch.float64).bfloat16().to(output)
    return [output, *torch.autograd.grad(output, leaves, grad)]


def compare(
    op: str,
    body: str,
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    device: str = "cpu",
    tolerance: float | None = None,
) -> None:
    """The body's output and gradients equal the fp64 reference's within the tolerance, whatever memory held before."""
    rounded = [x.to(dtype) for x in inputs]
    ops.configure({op: "reference"}, "cpu")
    truth = run(function, rounded, torch.float64)
    ops.configure({op: body}, device)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills every new tensor with NaN
    try:
        results = run(function, rounded, dtype, device)
    finally:
        torch.use_deterministic_algorithms(False)
    limit = TOLERANCE[dtype] if tolerance is None else tolerance
    for number, (result, expected) in enumerate(zip(results, truth, strict=True)):
        what = "output" if number == 0 else f"gradient {number - 1}"
        assert result.dtype == dtype or number == 0
        assert relative_error(result, expected) <= limit, f"{op} {body}: {what} off"
