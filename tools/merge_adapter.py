#!/usr/bin/env python3
"""Add a PEFT LoRA adapter to its base model: a Hugging Face folder comes out, with megatune-digests.json, which says
what became of each tensor. A merge that was cut goes on when it is started again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from megatune.checkpoint import resolve_model
from megatune.checkpoint.convert.base import Options
from megatune.checkpoint.convert.core import convert
from megatune.checkpoint.convert.progress import Progress, show
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
    parser.add_argument("--verify", action="store_true", help="read the result back and compare every tensor")
    parser.add_argument("--workers", type=int, help="processes; default: the cores that may be used")
    chosen = parser.parse_args(arguments)
    options = Options(adapter=str(chosen.adapter), dtype=DTYPES.get(chosen.dtype))
    try:
        base = resolve_model(chosen.base).path
        words = {"verify": chosen.verify, "workers": chosen.workers, "progress": Progress()}
        show(convert(base, chosen.output, "hf", options, **words))
    except MegatuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
