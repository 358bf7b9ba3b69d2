"""Weights that are published in 4 or 8 bits, as bf16: undone while they are read.

| `quant_method` | tensors in the file | value |
| --- | --- | --- |
| mxfp4 (gpt-oss) | NAME_blocks uint8 [E, out, G, 16], NAME_scales uint8 [E, out, G] | fp4 (e2m1) * 2 ** (scale - 127) |
| fp8 (DeepSeek-V3) | NAME float8 [out, in], NAME_scale_inv fp32 [out / block, in / block] | fp8 * scale_inv |

MXFP4 (OCP Microscaling Formats 1.0, section 5.3): 32 numbers have one scale; a byte holds two, the first in its low
half. NAME itself is [E, in, out], in = 32 G.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatune.checkpoint.sources import TensorSource

_BLOCKS, _SCALES, _INVERSE = "_blocks", "_scales", "_scale_inv"
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4 = torch.tensor((*_POSITIVE, *(-value for value in _POSITIVE)), dtype=torch.bfloat16)


def dequantised(source: TensorSource, config: Mapping[str, Any]) -> TensorSource:
    """`source` itself, or where `config` (config.json) says that it is quantised, its tensors as bf16."""
    settings = config.get("quantization_config")
    if not settings:
        return source
    return Dequantised(source, tuple(settings.get("weight_block_size") or (128, 128)))


class Dequantised:
    """A `TensorSource` of the numbers that quantised tensors stand for; the other tensors are as in `source`.
    `block`: rows and columns that have one scale, of fp8 weights."""

    def __init__(self, source: TensorSource, block: tuple[int, int]) -> None:
        self._source, self._block = source, block
        names = source.names()
        bare = {name.removesuffix(_BLOCKS) for name in names if name.endswith(_BLOCKS)}
        self._packed = {name for name in bare if f"{name}{_SCALES}" in names}
        self._scaled = {name for name in names if f"{name}{_INVERSE}" in names}
        helpers = {f"{name}{end}" for name in self._packed for end in (_BLOCKS, _SCALES)}
        helpers |= {f"{name}{_INVERSE}" for name in self._scaled}
        self._names = (names - helpers) | self._packed

    def __str__(self) -> str:
        return str(self._source)

    def names(self) -> set[str]:
        return set(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._packed:
            return self._source.shape(name)
        experts, rows, groups, half = self._source.shape(f"{name}{_BLOCKS}")
        return experts, groups * half * 2, rows

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16 if name in self._packed | self._scaled else self._source.dtype(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._packed:
            blocks = self._source.rows(f"{name}{_BLOCKS}", start, stop)
            scales = self._source.rows(f"{name}{_SCALES}", start, stop)
            return _from_fp4(blocks, scales).transpose(1, 2)
        if name in self._scaled:
            return self._from_fp8(name, start, stop)
        return self._source.rows(name, start, stop)

    def _from_fp8(self, name: str, start: int, stop: int) -> Tensor:
        values = self._source.rows(name, start, stop).float()
        rows, columns = self._block
        first, last = start // rows, -(-stop // rows)
        scales = self._source.rows(f"{name}{_INVERSE}", first, last).float()
        scales = scales.repeat_interleave(rows, 0)[start - first * rows :][: stop - start]
        values *= scales.repeat_interleave(columns, 1)[:, : values.shape[1]]
        return values.to(torch.bfloat16)


def _from_fp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """uint8 [E, out, G, 16] and [E, out, G] -> bf16 [E, out, 32 G]; exact, but for what bf16 cannot hold."""
    pairs = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    values = torch.ldexp(_FP4[pairs.int()], scales.int()[..., None] - 127)
    return values.to(torch.bfloat16).flatten(2)
