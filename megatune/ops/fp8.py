"""Linear layers whose three products are of 8 bit numbers: y = q(x) q(w)^T, dx = q(g) q(w), dw = q(g)^T q(x).

Quantising is seen as the identity by autograd (straight through). Gradients and outputs are in the input's
dtype; how exactly GPUs add up is said at `Fp8Recipe`. `fp8_fused` has layers that take along what stands
before them.

The product is PyTorch's (cuBLAS). Where a device has none for fp8 (CPUs, GPUs before Ada), the reference multiplies
the numbers that the codes stand for in fp32: the same values but for the order of sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatune.ops.checks import same_device
from megatune.ops.fp8_quantise import (
    BOTH,
    ROWS,
    TRANSPOSED,
    Factor,
    Quantised,
    Scaling,
    check_matrix,
    format_of,
    quantise,
)
from megatune.ops.registry import CUDA_DTYPES, Body, add_op


@dataclass(frozen=True)
class Fp8Recipe:
    """How a linear layer is computed in 8 bits.

    scaling: "rowwise", one scale for each row of each factor; or "blockwise", one for each 128 numbers along a row, and
    for each 128 x 128 of one factor, a weight or, for weight gradients, a gradient: finer, and one reading of the input
    less, but for widths that are multiples of 128, and in hardware on GPUs of compute capability 9.0 only. (Of two
    factors with one for each 128 numbers a product is slower.) gradients: the format of gradients; e5m2 has more range
    and less precision, and goes with rowwise only. wgrad: "bf16" computes weight gradients from unquantised factors.

    fast_gradients: let the tensor cores add up rowwise products of gradients in fewer bits than fp32, as they always do
    in the forward product; False adds their parts in fp32. Fast is the default: forward and backward of an 8B model's
    layers take 1/1.64 of bf16's time on an H200, without it 1/1.58 (benchmarks/results/fp8.json). What it costs grows
    with the numbers that are added up (in weight gradients, the tokens): tests hold a product to 0.6 % of its norm over
    2048 numbers and to 3 % over 16384, where rounding the factors to 8 bits takes 3.7 %.
    """

    scaling: Literal["rowwise", "blockwise"] = "rowwise"
    gradients: Literal["e4m3", "e5m2"] = "e4m3"
    wgrad: Literal["fp8", "bf16"] = "fp8"
    fast_gradients: bool = True

    def __post_init__(self) -> None:
        for name, known in (
            ("scaling", ("rowwise", "blockwise")),
            ("gradients", ("e4m3", "e5m2")),
            ("wgrad", ("fp8", "bf16")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"Fp8Recipe: {name} is {getattr(self, name)!r}, must be {' or '.join(known)}"
                )
        if self.scaling == "blockwise" and self.gradients == "e5m2":
            raise ValueError("Fp8Recipe: gradients in e5m2 go with rowwise scaling only; use e4m3")

    @property
    def inputs(self) -> Scaling:
        """Of activations and gradients."""
        return "rowwise" if self.scaling == "rowwise" else "blocks"

    @property
    def weights(self) -> Scaling:
        return "rowwise" if self.scaling == "rowwise" else "tiles"


@cache
def _products(device: int) -> tuple[str, ...]:
    """What the GPU multiplies itself."""
    capability = torch.cuda.get_device_capability(device)
    return ("rowwise", "blockwise") if capability == (9, 0) else ("rowwise",) if capability >= (8, 9) else ()


def products_problem() -> str | None:
    """Why this machine's current device does not multiply fp8, None if it does."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if not _products(torch.cuda.current_device()):
        return "fp8 products need a GPU of compute capability 8.9 or later"
    return None


def fp8_products() -> tuple[str, ...]:
    """The scalings of `Fp8Recipe` that the current device has products for."""
    return () if products_problem() is not None else _products(torch.cuda.current_device())


def _scaled_mm(a: Factor, b: Factor, dtype: torch.dtype, fast: bool) -> Tensor:
    left, right = a.codes.view(format_of(a.e5m2)), b.codes.view(format_of(b.e5m2)).t()
    if a.scaling == "rowwise":
        scales = a.scales.unsqueeze(1), b.scales.unsqueeze(0)
        out = torch._scaled_mm(left, right, *scales, out_dtype=torch.bfloat16, use_fast_accum=fast)
    else:
        from torch.nn.functional import ScalingType, scaled_mm

        kinds = {"blocks": ScalingType.BlockWise1x128, "tiles": ScalingType.BlockWise128x128}
        out = scaled_mm(
            left,
            right,
            a.scales.t(),
            kinds[a.scaling],
            b.scales.t(),
            kinds[b.scaling],
            output_dtype=torch.bfloat16,
        )
    return out.to(dtype)


def _dense_mm(a: Factor, b: Factor, dtype: torch.dtype, fast: bool) -> Tensor:
    return (a.dense() @ b.dense().t()).to(dtype)


_OP = add_op(
    "fp8_mm",
    [
        Body("scaled_mm", (_scaled_mm,), ("cuda",), CUDA_DTYPES, fp8_products, products_problem),
        Body("reference", (_dense_mm,)),
    ],
)


def _product(a: Factor, b: Factor, dtype: torch.dtype, fast: bool) -> Tensor:
    """a [M, K] b^T [K, N] -> [M, N] of dtype."""
    needed = "rowwise" if a.scaling == "rowwise" else "blockwise"
    return _OP.pick(a.codes.device.type, dtype, (needed,)).run[0](a, b, dtype, fast)


def _rows(y: Tensor, rows: int) -> Tensor:
    """The rows that stand for something, as a tensor of its own."""
    return y if y.shape[0] == rows else y[:rows].clone()


def input_copies(ctx: Any, weight_at: int, recipe: Fp8Recipe) -> int:
    """Copies of the input: the transposed one is for the weight's gradient."""
    return BOTH if ctx.needs_input_grad[weight_at] and recipe.wgrad == "fp8" else ROWS


def product_forward(
    ctx: Any, x: Quantised, weight: Tensor, dtype: torch.dtype, *extra: Tensor | None
) -> Tensor:
    """The product. Saved: the weight, the input's transposed copy, and `extra`."""
    ctx.save_for_backward(weight, x.codes_t, x.scales_t, *extra)
    ctx.input = (x.rows, x.scaling)
    quantised = quantise(weight, ctx.recipe.weights, copies=ROWS)
    return _rows(_product(x.plain, quantised.plain, dtype, fast=True), x.rows)


def product_backward(
    ctx: Any, grad: Tensor, weight: Tensor, codes_t: Tensor, scales_t: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(gradient of the layer's input; gradient of the weight if it is of 8 bit factors)."""
    recipe = ctx.recipe
    in_fp8 = need_weight and recipe.wgrad == "fp8"
    copies = (ROWS if need_x else 0) | (TRANSPOSED if in_fp8 else 0)
    if copies == 0:
        return None, None
    rows, scaling = ctx.input
    kind: Scaling = "mixed" if in_fp8 and scaling == "blocks" else scaling
    g = quantise(grad, kind, e5m2=recipe.gradients == "e5m2", copies=copies)
    grad_x = grad_weight = None
    if need_x:
        quantised = quantise(weight, recipe.weights, copies=TRANSPOSED)
        grad_x = _rows(_product(g.plain, quantised.transposed, grad.dtype, recipe.fast_gradients), rows)
    if in_fp8:
        x_t = Factor(codes_t, scales_t, scaling, False)
        grad_weight = _product(g.transposed, x_t, weight.dtype, recipe.fast_gradients)
    return grad_x, grad_weight


class _Linear(torch.autograd.Function):
    """x [T, in], weight [out, in] -> [T, out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Fp8Recipe) -> Tensor:
        ctx.recipe = recipe
        quantised = quantise(x, recipe.inputs, copies=input_copies(ctx, 1, recipe))
        wide = x if ctx.needs_input_grad[1] and recipe.wgrad == "bf16" else None
        return product_forward(ctx, quantised, weight, x.dtype, wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, x = ctx.saved_tensors
        grad_x, grad_weight = product_backward(ctx, grad, *saved, *ctx.needs_input_grad[:2])
        if x is not None:
            grad_weight = (grad.t() @ x).to(saved[0].dtype)
        return grad_x, grad_weight, None


def check_linear(
    op: str, x: Tensor, width: int, weight: Tensor, bias: Tensor | None, recipe: Fp8Recipe
) -> None:
    check_matrix(op, "weight", weight, weight.shape[-1], recipe.weights)
    step = 16 if recipe.scaling == "rowwise" else 128
    if weight.shape[0] == 0 or weight.shape[0] % step:
        raise ValueError(
            f"{op}: weight {tuple(weight.shape)} must have outputs that are a multiple of {step} with "
            f"{recipe.scaling} scaling"
        )
    if width != weight.shape[1]:
        raise ValueError(f"{op}: weight {tuple(weight.shape)} must be [out, {width}]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias {tuple(bias.shape)} must be [{weight.shape[0]}]")
    same_device(op, x, weight=weight, bias=bias)


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    recipe: Fp8Recipe = Fp8Recipe(),
) -> Tensor:
    """x [T, in] weight^T + bias -> [T, out] of x's dtype, in 8 bits as `recipe` says.

    weight [out, in]; x and weight fp32, bf16 or fp16; `in` and `out` multiples of 16 (blockwise: 128), T anything.
    Gradients to x, weight and bias. ValueError where shapes, dtypes or devices do not fit."""
    op = "fp8_linear"
    check_matrix(op, "x", x, x.shape[-1], recipe.inputs)
    check_linear(op, x, x.shape[1], weight, bias, recipe)
    y = _Linear.apply(x, weight, recipe)
    return y if bias is None else y + bias
