"""Writes tests/unit/golden/quant.json: what bitsandbytes makes of some weights; tests compare ours with it.

    python tools/make_quant_golden.py      (needs bitsandbytes, whose CPU kernels are enough)

For each weight (`tests.helpers.quant.golden_weight`) the SHA-256 of the bytes of every tensor of its NF4 and int8
forms, and of what these stand for. All is what bitsandbytes' public functions give on a CPU, but for two things:

- Scales in 8 bits are from its own PyTorch path, which it takes here for fp64. That rounds to the nearest number of the
  code, as we do; its CPU kernel for fp32 looks numbers up in a table of 65536 and gives the
  second nearest for about two in a thousand (counted below).
- Dense weights whose rows are no multiple of 64 numbers long are from its PyTorch path too: its kernel for AVX-512 lets
  blocks begin anew with each row, though its quantisation does not.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes import functional

from tests.helpers.quant import CASES, golden_weight

TARGET = Path(__file__).parent.parent / "tests/unit/golden/quant.json"


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def golden(rows: int, columns: int, dtype: torch.dtype) -> tuple[dict[str, str], int]:
    weight = golden_weight(rows, columns, dtype)
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4", quant_storage=torch.uint8
    )
    _, plain = functional.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
    centred = plain.absmax - state.offset
    scales, nested = torch.ops.bitsandbytes.quantize_blockwise(centred.double(), state.state2.code, 256)
    assert torch.equal(nested, state.state2.absmax)
    assert torch.equal(state.offset, plain.absmax.mean())
    off = int((scales != state.absmax).sum())
    unnested = functional.dequantize_blockwise(scales, state.state2) + state.offset
    if columns % 64 == 0:
        state.absmax = scales
        dense = functional.dequantize_4bit(packed, state)
    else:
        codes = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), -1).view(-1)[: weight.numel()]
        values = state.code[codes.int()] * unnested.repeat_interleave(64)[: weight.numel()]
        dense = values.view_as(weight).to(dtype)
    numbers, rowwise, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    dense_int8 = functional.int8_vectorwise_dequant(numbers, rowwise)
    found = {
        "nf4 packed": packed.view(-1),
        "nf4 scales": scales,
        "nf4 nested": nested,
        "nf4 offset": state.offset.view(1),
        "nf4 scales in fp32": unnested,
        "nf4 dense": dense,
        "int8 numbers": numbers,
        "int8 scales": rowwise,
        "int8 dense": dense_int8.to(dtype),
        "nf4 code": state.code,
        "dynamic code": state.state2.code,
    }
    return {name: digest(tensor) for name, tensor in found.items()}, off


def main() -> None:
    cases, differing = {}, 0
    for name, (rows, columns, dtype) in CASES.items():
        cases[name], off = golden(rows, columns, dtype)
        differing += off
    print(f"{differing} scales differ between bitsandbytes' CPU kernel and its PyTorch path")
    versions = {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__}
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(json.dumps({"versions": versions, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
