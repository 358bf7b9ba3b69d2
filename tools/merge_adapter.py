#!/usr/bin/env python3
"""Add a PEFT LoRA adapter to its base model: a Hugging Face folder comes out. One tensor is in memory at a time."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from megatune.checkpoint import merge_peft, resolve_model
from megatune.errors import MegatuneError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="Hugging Face folder, .gguf file, package:NAME or hub name")
    parser.add_argument(
        "adapter", type=Path, help="folder with adapter_config.json and adapter_model.safetensors"
    )
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights; default: the base's own")
    chosen = parser.parse_args(arguments)
    try:
        merge_peft(resolve_model(chosen.base), chosen.adapter, chosen.output, DTYPES.get(chosen.dtype))
    except MegatuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {chosen.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
