"""Frozen weights in 4 and 8 bits, in the formats of bitsandbytes, bit for bit.

| kind | a weight [out, in] is kept as | bytes an element |
| --- | --- | --- |
| nf4 (QLoRA, arXiv:2305.14314) | 4 bit numbers, a scale in 8 bits for each 64 | 0.516 |
| int8 (LLM.int8, arXiv:2208.07339) | 8 bit numbers, a scale in fp32 for each row | 1 |

nf4: of two numbers the first is in a byte's high half; a scale is the largest magnitude among its numbers, less the
mean of all scales, in the dynamic code, with an fp32 scale for each 256. int8: round(127 * weight / scale) of the
weight in fp16, the scale of a row its largest magnitude.

A product makes the weight dense in the input's dtype, forward and backward: only the input has a gradient, and nothing
dense stays between them. int8 products are of dense weights too: bitsandbytes' outliers, which stay in fp16, are of
inputs in 8 bits, which are for inference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatune.ops.checks import floating, same_device
from megatune.ops.registry import Body, add_op, compiled_body, cpu_body, cuda_body, define, fuse

Kind = Literal["nf4", "int8"]
KINDS: tuple[Kind, ...] = ("nf4", "int8")
BLOCK = 64  # numbers that have one scale
NESTED = 256  # scales that have one scale
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Quantiles of the normal distribution, as bitsandbytes has them.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_INT8_STEP = 7.874015718698502e-3  # 1 / 127


def _borders(code: Tensor) -> Tensor:
    """Where one number of an ascending code ends and the next begins."""
    return (code[:-1] + code[1:]) / 2


def dynamic_code() -> Tensor:
    """The 256 numbers that scales are rounded to, ascending, fp32 (signed dynamic tree quantisation,
    arXiv:1511.04561): seven decades, with 1, 2, .. 64 numbers each, of both signs, and 0 and 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        borders = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        means = (borders[:-1] + borders[1:]) / 2.0
        values += (10 ** (decade - 6) * means).tolist() + (-(10 ** (decade - 6)) * means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


_DYNAMIC = dynamic_code()
_ON_CPU = (_borders(torch.tensor(NF4, dtype=torch.float32, device="cpu")), _borders(_DYNAMIC), _DYNAMIC)
_ELSEWHERE: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}


def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(borders of the NF4 code [15], of the dynamic code [255], that code [256]) on a device."""
    if device.type == "cpu":
        return _ON_CPU
    found = _ELSEWHERE.get(device)
    if found is None:
        nf4, borders, code = (table.to(device) for table in _ON_CPU)
        found = (nf4, borders, code)
        if (
            type(code) is Tensor and not code.is_meta
        ):  # a FakeTensor or on meta it has no values: not for later
            _ELSEWHERE[device] = found
    return found


def quantise_nf4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(packed uint8 [numbers / 2], scales uint8 [blocks], nested scales fp32 [blocks / 256], offset fp32 []) of a
    weight of any shape in fp32, bf16 or fp16, counted row by row and rounded up. The numbers are those of
    `bitsandbytes.functional.quantize_4bit(.., compress_statistics=True)` on a CPU. ValueError for another dtype."""
    _check_dtype("quantise_nf4", "weight", weight.dtype)
    borders, nested_borders, _ = _tables(weight.device)
    values, scales = _scaled(weight, BLOCK, divides_rest=True)
    # One number to fill the last byte where they are odd: 0 has the code 7.
    codes = torch.bucketize(F.pad(values, (0, len(values) % 2)), borders, out_int32=True).to(torch.uint8)
    offset = scales.mean()
    nested, nested_scales = _scaled(scales - offset, NESTED, divides_rest=False)
    numbers = torch.bucketize(nested, nested_borders, out_int32=True).to(torch.uint8)
    return codes[::2] << 4 | codes[1::2], numbers, nested_scales, offset


def _scaled(weight: Tensor, block: int, *, divides_rest: bool) -> tuple[Tensor, Tensor]:
    """(numbers / scale [n], scales [blocks]), fp32; a scale is the largest magnitude in a block."""
    flat = weight.reshape(-1).float()
    whole = len(flat) // block * block
    blocks, rest = flat[:whole].view(-1, block), flat[whole:]
    scales = blocks.abs().amax(1)
    values = (blocks * (1.0 / scales.clamp(min=1e-38)).unsqueeze(1)).view(-1)
    if len(rest):
        last = rest.abs().amax().clamp(min=1e-38)
        values = torch.cat([values, rest / last if divides_rest else rest * (1.0 / last)])
        scales = torch.cat([scales, last.view(1)])
    return values.clamp(-1, 1), scales


def nf4_scales(scales: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    """The scales that 8 bit ones stand for: uint8 [blocks], fp32 [blocks / 256], fp32 [] -> fp32 [blocks]."""
    return _wide_scales(scales, nested, offset, _tables(scales.device)[2])


def _wide_scales(scales: Tensor, nested: Tensor, offset: Tensor, code: Tensor) -> Tensor:
    values = code[scales.int()]
    values = F.pad(values, (0, -len(values) % NESTED)).view(-1, NESTED) * nested.unsqueeze(1)
    return values.view(-1)[: len(scales)] + offset


def _reference(packed: Tensor, scales: Tensor, rows: int, columns: int, dtype: int) -> Tensor:
    code = torch.tensor(NF4, dtype=torch.float32, device=packed.device)
    numbers = torch.stack((packed >> 4, packed & 15), -1).view(-1)[: rows * columns]
    values = F.pad(code[numbers.int()], (0, -(rows * columns) % BLOCK)).view(-1, BLOCK) * scales.unsqueeze(1)
    return values.view(-1)[: rows * columns].to(_DTYPES[dtype]).view(rows, columns)


def _fake(packed: Tensor, scales: Tensor, rows: int, columns: int, dtype: int) -> Tensor:
    return packed.new_empty((rows, columns), dtype=_DTYPES[dtype])


def _after_scales(dense: Callable) -> Callable:
    """What makes numbers dense from what does so for scales in fp32. `code`: of the scales, `dynamic_code()`; `how`:
    rows, columns, dtype."""

    def run(
        packed: Tensor, scales: Tensor, nested: Tensor, offset: Tensor, code: Tensor, *how: int
    ) -> Tensor:
        return dense(packed, _wide_scales(scales, nested, offset, code), *how)

    return run


_whole = _after_scales(_reference)


def _fake_whole(packed: Tensor, scales: Tensor, *more: Any) -> Tensor:
    return _fake(packed, scales, *more[-3:])


def _int8_reference(numbers: Tensor, scales: Tensor, step: float, dtype: int) -> Tensor:
    return (numbers * scales.unsqueeze(1)).mul_(step).to(_DTYPES[dtype])


def _fake_int8(numbers: Tensor, scales: Tensor, step: float, dtype: int) -> Tensor:
    return numbers.new_empty(numbers.shape, dtype=_DTYPES[dtype])


_DENSE = define(
    "nf4_dequantise(Tensor packed, Tensor scales, int rows, int columns, int dtype) -> Tensor",
    _reference,
    _fake,
)
# The scales' own scales in the same pass.
_NF4 = define(
    "nf4_dense(Tensor packed, Tensor scales, Tensor nested, Tensor offset, Tensor code, int rows, int columns, "
    "int dtype) -> Tensor",
    _whole,
    _fake_whole,
)
_INT8 = define(
    "int8_dense(Tensor numbers, Tensor scales, float step, int dtype) -> Tensor", _int8_reference, _fake_int8
)
_OP = add_op(
    "nf4_dequantise",
    [
        cpu_body(_after_scales(_DENSE)),
        cuda_body(_NF4),
        compiled_body(_after_scales(fuse(_reference))),
        Body("reference", (_whole,)),
    ],
)
_OP_INT8 = add_op("int8_dequantise", [cuda_body(_INT8), Body("reference", (_int8_reference,))])


def dequantise_nf4(
    packed: Tensor, scales: Tensor, nested: Tensor, offset: Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """[out, in] = `shape` of `dtype` from what `quantise_nf4` gives: code * scale in fp32, rounded once. ValueError for
    tensors that are of another weight."""
    op, size = "dequantise_nf4", shape[0] * shape[1]
    _check_dtype(op, "dtype", dtype)
    blocks = -(-size // BLOCK)
    wanted = {
        "packed": (-(-size // 2),),
        "scales": (blocks,),
        "nested": (-(-blocks // NESTED),),
        "offset": (),
    }
    tensors = {"packed": packed, "scales": scales, "nested": nested, "offset": offset}
    for name, tensor in tensors.items():
        kind = torch.uint8 if name in ("packed", "scales") else torch.float32
        if tensor.shape != wanted[name] or tensor.dtype != kind or not tensor.is_contiguous():
            raise ValueError(
                f"{op}: {name} must be contiguous {kind} {wanted[name]} for a weight {tuple(shape)}, got "
                f"{tensor.dtype} {tuple(tensor.shape)}"
            )
    same_device(op, packed, scales=scales, nested=nested, offset=offset)
    body = _OP.pick(packed.device.type, dtype)
    code = _tables(packed.device)[2]
    return body.run[0](packed, scales, nested, offset, code, *shape, _DTYPES.index(dtype))


def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [out, in], scales fp32 [out]) of a weight [out, in] in fp32, bf16 or fp16, through fp16 as in
    `bitsandbytes.nn.Linear8bitLt`; a row of zeros stays one. ValueError for another dtype or shape, or a weight beyond
    the range of fp16."""
    _check_dtype("quantise_int8", "weight", weight.dtype)
    if weight.dim() != 2:
        raise ValueError(f"quantise_int8: weight {tuple(weight.shape)} must be [out, in]")
    half = weight.to(torch.float16)
    scales = half.abs().amax(1).float()
    if not scales.isfinite().all():
        raise ValueError("quantise_int8: weight holds numbers that fp16 cannot hold (above 65504); use nf4")
    factor = torch.where(scales > 0, 127.0 / scales, 0.0)
    return torch.round(half * factor.unsqueeze(1)).to(torch.int8), scales


def dequantise_int8(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, in] of `dtype` from what `quantise_int8` gives: number * scale / 127 in fp32, rounded once."""
    op = "dequantise_int8"
    _check_dtype(op, "dtype", dtype)
    if numbers.dim() != 2 or numbers.dtype != torch.int8:
        raise ValueError(f"{op}: numbers {numbers.dtype} {tuple(numbers.shape)} must be int8 [out, in]")
    if scales.shape != numbers.shape[:1] or scales.dtype != torch.float32:
        raise ValueError(
            f"{op}: scales {scales.dtype} {tuple(scales.shape)} must be fp32 [{numbers.shape[0]}]"
        )
    same_device(op, numbers, scales=scales)
    body = _OP_INT8.pick(numbers.device.type, dtype)
    return body.run[0](numbers.contiguous(), scales.contiguous(), _INT8_STEP, _DTYPES.index(dtype))


class FrozenWeight(nn.Module):
    """A weight [out, in] in 4 or 8 bits: stands where a linear layer would have its parameter `weight`.

    Its tensors are buffers, made on the current device and without values until `keep`. `shape`: of the weight;
    `device`: where it is; `dtype`: the one that it is quantised from.
    """

    def __init__(self, kind: Kind, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"FrozenWeight: kind is {kind!r}, must be one of {', '.join(KINDS)}")
        _check_dtype("FrozenWeight", "dtype", dtype)
        self.kind, self.shape, self.dtype = kind, torch.Size(shape), dtype
        rows, columns = shape
        if kind == "int8":
            self.register_buffer("numbers", torch.empty(rows, columns, dtype=torch.int8))
            self.register_buffer("scales", torch.empty(rows, dtype=torch.float32))
            return
        blocks = -(-rows * columns // BLOCK)
        self.register_buffer("numbers", torch.empty(-(-rows * columns // 2), dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(blocks, dtype=torch.uint8))
        self.register_buffer("nested", torch.empty(-(-blocks // NESTED), dtype=torch.float32))
        self.register_buffer("offset", torch.empty((), dtype=torch.float32))

    @property
    def device(self) -> torch.device:
        return self.numbers.device

    @torch.no_grad()
    def keep(self, weight: Tensor) -> None:
        """Quantise `weight` into this."""
        if weight.shape != self.shape:
            raise ValueError(f"FrozenWeight: weight {tuple(weight.shape)} must be {tuple(self.shape)}")
        made = quantise_nf4(weight) if self.kind == "nf4" else quantise_int8(weight)
        for buffer, value in zip(self.buffers(), made, strict=True):
            buffer.copy_(value)

    @torch.no_grad()
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight that it stands for, a new tensor."""
        if self.kind == "int8":
            return dequantise_int8(self.numbers, self.scales, dtype)
        shape = (self.shape[0], self.shape[1])
        return dequantise_nf4(self.numbers, self.scales, self.nested, self.offset, shape, dtype)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.shape[0]} x {self.shape[1]}"


def dense(weight: Tensor | FrozenWeight, dtype: torch.dtype) -> Tensor:
    """The weight itself, or the one that a frozen one stands for."""
    return weight.dense(dtype) if isinstance(weight, FrozenWeight) else weight


def saved(weight: Tensor | FrozenWeight) -> tuple[FrozenWeight | None, Tensor | None]:
    """(what an autograd context keeps as an attribute, what it saves as a tensor)."""
    return (weight, None) if isinstance(weight, FrozenWeight) else (None, weight)


class _QuantisedLinear(torch.autograd.Function):
    """x @ weight^T + bias. Saved: nothing but the weight in its few bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dense(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, _, need_bias = ctx.needs_input_grad
        grad_x = grad @ ctx.weight.dense(grad.dtype) if need_x else None
        return grad_x, None, grad.sum(0) if need_bias else None


def quantised_linear(x: Tensor, weight: FrozenWeight, bias: Tensor | None = None) -> Tensor:
    """x [T, in] @ weight^T + bias -> [T, out] of x's dtype; gradients to x and bias only. ValueError where shapes or
    devices do not fit."""
    op = "quantised_linear"
    floating(op, x=x)
    if x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"{op}: x {tuple(x.shape)} must be [T, {weight.shape[1]}]")
    if x.device != weight.device:
        raise ValueError(f"{op}: weight is on {weight.device}, the first argument on {x.device}")
    same_device(op, x, bias=bias)
    return _QuantisedLinear.apply(x, weight, bias)


def _check_dtype(op: str, name: str, dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"{op}: {name} must be one of fp32, bf16 and fp16, got {dtype}")
