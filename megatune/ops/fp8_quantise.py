"""Matrices in 8 bit floating point (arXiv:2209.05433) with scales, in the layouts that products of them need.

A product takes both its factors with the inner dimension contiguous. A linear layer's input is a factor of two
products, once along its features and once along its tokens, so that it is quantised twice, as it is and transposed;
gradients and weights likewise. Both copies come from one reading of the matrix where the scales allow it.

| scaling | a scale (fp32) for | scales | scales of the transposed copy |
| --- | --- | --- | --- |
| rowwise | each row of each copy | [padded] | [width] |
| blocks | each 128 numbers along a row of each copy | [width / 128, padded] | [padded / 128, width] |
| tiles | each 128 x 128, for weights | [padded / 128, width / 128] | [width / 128, padded / 128] |
| mixed | as blocks, transposed as tiles, for gradients | [width / 128, padded] | [width / 128, padded / 128] |

Blocks and tiles are those of arXiv:2412.19437. Scales of tiles have rows padded to a multiple of four, as cuBLAS reads
them. `padded`: the rows, and rows of zeros behind them up to a multiple of 16 (rowwise) or 128; products of 8 bit
numbers want that.

scale = largest magnitude * (1 / largest number of the format), NaN left out; 1 where all is below 2^-100. code =
value * (1 / scale) in fp32, rounded to the nearest, never beyond the largest number; NaN stays NaN, and an infinite
value makes everything under its scale NaN in products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatune.ops.checks import same_device
from megatune.ops.glu import ACTIVATIONS, Activation
from megatune.ops.registry import (
    CUDA_DTYPES,
    OPS,
    Body,
    add_op,
    cuda_body,
    define,
    fuse,
    inductor_problem,
)

Scaling = Literal["rowwise", "blocks", "tiles", "mixed"]
SCALINGS: tuple[Scaling, ...] = ("rowwise", "blocks", "tiles", "mixed")  # the operators take the index
BLOCK = 128
ROWS, TRANSPOSED, BOTH = 1, 2, 3  # which copies are wanted
_LEAST = 2.0**-100
_Copies = tuple[Tensor, Tensor, Tensor, Tensor]


def of_copies(scaling: Scaling) -> tuple[Scaling, Scaling]:
    """How the copy as it is and the transposed one are scaled."""
    return ("blocks", "tiles") if scaling == "mixed" else (scaling, scaling)


def format_of(e5m2: bool) -> torch.dtype:
    return torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn


def step_of(scaling: Scaling) -> int:
    """What the width and the padded rows are multiples of."""
    return 16 if scaling == "rowwise" else BLOCK


def padded_rows(rows: int, scaling: Scaling) -> int:
    step = step_of(scaling)
    return max(1, -(-rows // step)) * step


@dataclass(frozen=True, eq=False)
class Factor:
    """One factor of a product: codes uint8 [rows, inner] and their scales, as the module's table says."""

    codes: Tensor
    scales: Tensor
    scaling: Scaling
    e5m2: bool

    def dense(self) -> Tensor:
        """The numbers that it stands for, fp32 [rows, inner]."""
        values, scales = self.codes.view(format_of(self.e5m2)).float(), self.scales
        if self.scaling == "rowwise":
            return values * scales.unsqueeze(1)
        if self.scaling == "blocks":
            return values * scales.t().repeat_interleave(BLOCK, 1)
        scales = scales[:, : values.shape[1] // BLOCK]
        return values * scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


@dataclass(frozen=True, eq=False)
class Quantised:
    """A matrix [rows, width] in 8 bits: up to two copies; one that was not asked for is empty."""

    rows: int
    scaling: Scaling
    e5m2: bool
    codes: Tensor
    scales: Tensor
    codes_t: Tensor
    scales_t: Tensor

    @property
    def plain(self) -> Factor:
        """[padded, width]"""
        return Factor(self.codes, self.scales, of_copies(self.scaling)[0], self.e5m2)

    @property
    def transposed(self) -> Factor:
        """[width, padded]"""
        return Factor(self.codes_t, self.scales_t, of_copies(self.scaling)[1], self.e5m2)


def _scaled(values: Tensor, peaks: Tensor, e5m2: bool) -> tuple[Tensor, Tensor]:
    """(codes like values, scales like peaks). `peaks`: the largest magnitudes, broadcast over what they are of."""
    largest = torch.finfo(format_of(e5m2)).max
    scales = torch.where(peaks > _LEAST, peaks * (1.0 / largest), 1.0)
    codes = (values * scales.reciprocal()).clamp(-largest, largest).to(format_of(e5m2))
    return codes.view(torch.uint8), scales


def _layout(values: Tensor, scaling: Scaling, e5m2: bool) -> tuple[Tensor, Tensor]:
    """(codes, scales) of one copy: fp32 [rows, inner], both whole multiples of the scaling's step."""
    magnitudes = values.abs().nan_to_num(nan=0.0, posinf=float("inf"))
    if scaling == "rowwise":
        codes, scales = _scaled(values, magnitudes.amax(1, keepdim=True), e5m2)
        return codes.contiguous(), scales.squeeze(1)
    if scaling == "blocks":
        cut = (-1, BLOCK)
        peaks = magnitudes.unflatten(1, cut).amax(2, keepdim=True)
        codes, scales = _scaled(values.unflatten(1, cut), peaks, e5m2)
        return codes.flatten(1).contiguous(), scales.squeeze(2).t().contiguous()
    shape = (values.shape[0] // BLOCK, BLOCK, values.shape[1] // BLOCK, BLOCK)
    peaks = magnitudes.reshape(shape).amax((1, 3), keepdim=True)
    codes, scales = _scaled(values.reshape(shape), peaks, e5m2)
    scales = scales.view(shape[0], shape[2])
    return codes.reshape(values.shape).contiguous(), F.pad(scales, (0, -shape[2] % 4), value=1.0)


def _both(x: Tensor, scaling: Scaling, e5m2: bool, plain: bool, transposed: bool) -> _Copies:
    values = F.pad(x.float(), (0, 0, 0, padded_rows(x.shape[0], scaling) - x.shape[0]))
    none = (x.new_empty(0, dtype=torch.uint8), x.new_empty(0, dtype=torch.float32))
    of_rows, of_columns = of_copies(scaling)
    first = _layout(values, of_rows, e5m2) if plain else none
    none = (x.new_empty(0, dtype=torch.uint8), x.new_empty(0, dtype=torch.float32))
    second = _layout(values.t(), of_columns, e5m2) if transposed else none
    return *first, *second


def _normed(
    x: Tensor, weight: Tensor, eps: float, offset: float, scaling: Scaling, plain: bool, transposed: bool
) -> tuple[Tensor, ...]:
    y, rstd = OPS["rms_norm"].bodies["reference"].run[0](x, weight, eps, offset)
    return *_both(y, scaling, False, plain, transposed), rstd


def _gated(
    gate_up: Tensor, activation: Activation, scaling: Scaling, plain: bool, transposed: bool
) -> _Copies:
    # The activation is no whole number here: torch.compile makes a kernel for each, as for flags.
    y = OPS["glu"].bodies["reference"].run[0](gate_up, ACTIVATIONS.index(activation))
    return _both(y, scaling, False, plain, transposed)


def _flags(copies: int) -> tuple[bool, bool]:
    return bool(copies & ROWS), bool(copies & TRANSPOSED)


def _reference(x: Tensor, scaling: int, e5m2: bool, copies: int) -> _Copies:
    return _both(x, SCALINGS[scaling], e5m2, *_flags(copies))


def _norm_reference(
    x: Tensor, weight: Tensor, eps: float, offset: float, scaling: int, copies: int
) -> tuple[Tensor, ...]:
    return _normed(x, weight, eps, offset, SCALINGS[scaling], *_flags(copies))


def _glu_reference(gate_up: Tensor, activation: int, scaling: int, copies: int) -> _Copies:
    return _gated(gate_up, ACTIVATIONS[activation], SCALINGS[scaling], *_flags(copies))


_FUSED, _FUSED_NORM, _FUSED_GLU = fuse(_both), fuse(_normed), fuse(_gated)


def _compiled(x: Tensor, scaling: int, e5m2: bool, copies: int) -> _Copies:
    return _FUSED(x, SCALINGS[scaling], e5m2, *_flags(copies))


def _norm_compiled(
    x: Tensor, weight: Tensor, eps: float, offset: float, scaling: int, copies: int
) -> tuple[Tensor, ...]:
    return _FUSED_NORM(x, weight, eps, offset, SCALINGS[scaling], *_flags(copies))


def _glu_compiled(gate_up: Tensor, activation: int, scaling: int, copies: int) -> _Copies:
    return _FUSED_GLU(gate_up, ACTIVATIONS[activation], SCALINGS[scaling], *_flags(copies))


def _empty(x: Tensor, width: int, scaling: int, copies: int) -> _Copies:
    kind = SCALINGS[scaling]
    padded = padded_rows(x.shape[0], kind)

    def one(rows: int, inner: int, kind: Scaling) -> tuple[Tensor, Tensor]:
        shape: tuple[int, ...] = (rows,)
        if kind == "blocks":
            shape = (inner // BLOCK, rows)
        elif kind == "tiles":
            shape = (rows // BLOCK, -(-inner // BLOCK // 4) * 4)
        return x.new_empty((rows, inner), dtype=torch.uint8), x.new_empty(shape, dtype=torch.float32)

    def none() -> tuple[Tensor, Tensor]:
        return x.new_empty(0, dtype=torch.uint8), x.new_empty(0, dtype=torch.float32)

    plain, transposed = _flags(copies)
    of_rows, of_columns = of_copies(kind)
    first = one(padded, width, of_rows) if plain else none()
    return *first, *(one(width, padded, of_columns) if transposed else none())


def _fake(x: Tensor, scaling: int, e5m2: bool, copies: int) -> _Copies:
    return _empty(x, x.shape[1], scaling, copies)


def _norm_fake(
    x: Tensor, weight: Tensor, eps: float, offset: float, scaling: int, copies: int
) -> tuple[Tensor, ...]:
    return *_empty(x, x.shape[1], scaling, copies), x.new_empty(x.shape[0], dtype=torch.float32)


def _glu_fake(gate_up: Tensor, activation: int, scaling: int, copies: int) -> _Copies:
    return _empty(gate_up, gate_up.shape[1] // 2, scaling, copies)


_PLAIN = define(
    "fp8_quantise(Tensor x, int scaling, bool e5m2, int copies) -> (Tensor, Tensor, Tensor, Tensor)",
    _reference,
    _fake,
)
_NORM = define(
    "fp8_rms_norm(Tensor x, Tensor weight, float eps, float offset, int scaling, int copies) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _norm_reference,
    _norm_fake,
)
_GLU = define(
    "fp8_glu(Tensor gate_up, int activation, int scaling, int copies) -> (Tensor, Tensor, Tensor, Tensor)",
    _glu_reference,
    _glu_fake,
)


def _compiled_problem() -> str | None:
    problem = inductor_problem()
    if problem is None and torch.cuda.get_device_capability() < (8, 9):
        return "this GPU has no instructions for fp8"
    return problem


def _bodies(operator: object, compiled: object, reference: object) -> list[Body]:
    # Here the compiled kernels stand first: what torch.compile makes of two layouts reads the matrix once for each.
    return [
        cuda_body(operator),
        Body("compiled", (compiled,), ("cuda",), problem=_compiled_problem),
        Body("reference", (reference,)),
    ]


_OP = add_op("fp8_quantise", _bodies(_PLAIN, _compiled, _reference))
_NORM_OP = add_op("fp8_rms_norm", _bodies(_NORM, _norm_compiled, _norm_reference))
_GLU_OP = add_op("fp8_glu", _bodies(_GLU, _glu_compiled, _glu_reference))


def check_matrix(op: str, name: str, x: Tensor, width: int, scaling: Scaling) -> None:
    """x must be a matrix of fp32, bf16 or fp16, and `width` what the scaling can have."""
    if scaling not in SCALINGS:
        raise ValueError(f"{op}: scaling is {scaling!r}, must be one of {', '.join(SCALINGS)}")
    if x.dim() != 2 or width == 0 or width % step_of(scaling):
        raise ValueError(
            f"{op}: {name} {tuple(x.shape)} must be a matrix whose width is a multiple of {step_of(scaling)} "
            f"with {scaling} scales"
        )
    if x.dtype not in CUDA_DTYPES:
        raise ValueError(f"{op}: {name} must be fp32, bf16 or fp16, got {x.dtype}")


def _check_copies(op: str, copies: int) -> None:
    if copies not in (ROWS, TRANSPOSED, BOTH):
        raise ValueError(f"{op}: copies is {copies!r}, must be 1 (rows), 2 (transposed) or 3 (both)")


def _in_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def quantise(x: Tensor, scaling: Scaling, *, e5m2: bool = False, copies: int = BOTH) -> Quantised:
    """x [rows, width] of fp32, bf16 or fp16 in any strides -> `copies` of it: 1 (as it is), 2 (transposed), 3 (both).
    `e5m2`: the format with more range and less precision, for gradients with rowwise scales. No autograd. ValueError
    for another shape, dtype or width."""
    op = "fp8_quantise"
    check_matrix(op, "x", x, x.shape[-1], scaling)
    _check_copies(op, copies)
    if e5m2 and scaling != "rowwise":
        raise ValueError(f"{op}: e5m2 goes with rowwise scales only, not with {scaling}")
    body = _OP.pick(x.device.type, x.dtype)
    made = body.run[0](_in_rows(x), SCALINGS.index(scaling), e5m2, copies)
    return Quantised(x.shape[0], scaling, e5m2, *made)


def quantise_rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, scaling: Scaling, *, copies: int = BOTH
) -> tuple[Quantised, Tensor]:
    """(`rms_norm(x, weight, eps, offset)`, rounded to x's dtype, in 8 bits; rstd fp32 [rows]). x [rows, width], weight
    [width]; rowwise or blocks. No autograd. ValueError where shapes, dtypes or devices do not fit."""
    op = "fp8_rms_norm"
    check_matrix(op, "x", x, x.shape[-1], scaling)
    _check_copies(op, copies)
    if weight.shape != x.shape[1:] or weight.dtype not in CUDA_DTYPES:
        raise ValueError(
            f"{op}: weight {weight.dtype} {tuple(weight.shape)} must be fp32, bf16 or fp16 [{x.shape[1]}]"
        )
    _not_tiles(op, scaling)
    same_device(op, x, weight=weight)
    body = _NORM_OP.pick(x.device.type, x.dtype)
    *made, rstd = body.run[0](_in_rows(x), weight.contiguous(), eps, offset, SCALINGS.index(scaling), copies)
    return Quantised(x.shape[0], scaling, False, *made), rstd


def quantise_glu(
    gate_up: Tensor, activation: Activation, scaling: Scaling, *, copies: int = BOTH
) -> Quantised:
    """`glu(gate_up, activation)`, rounded to its dtype, in 8 bits. gate_up [rows, 2 * width] interleaved; rowwise or
    blocks. No autograd. ValueError for another shape or dtype, or an unknown activation."""
    op = "fp8_glu"
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}, must be one of {', '.join(ACTIVATIONS)}")
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"{op}: gate_up {tuple(gate_up.shape)} must be [T, 2I]")
    check_matrix(op, "activation(gate) * up of gate_up", gate_up, gate_up.shape[1] // 2, scaling)
    _check_copies(op, copies)
    _not_tiles(op, scaling)
    body = _GLU_OP.pick(gate_up.device.type, gate_up.dtype)
    made = body.run[0](_in_rows(gate_up), ACTIVATIONS.index(activation), SCALINGS.index(scaling), copies)
    return Quantised(gate_up.shape[0], scaling, False, *made)


def _not_tiles(op: str, scaling: Scaling) -> None:
    if scaling not in ("rowwise", "blocks"):
        raise ValueError(
            f"{op}: scaling is {scaling!r}, which is not for activations; must be rowwise or blocks"
        )
