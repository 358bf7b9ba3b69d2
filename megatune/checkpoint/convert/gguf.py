"""GGUF files (llama.cpp): read, dequantised to fp32."""

from __future__ import annotations

from pathlib import Path

from megatune.checkpoint.convert.base import Format, Opened, Options

_MAGIC = b"GGUF"


def detect(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == _MAGIC


def open_gguf(path: Path, options: Options) -> Opened:
    """A GGUF file; tokenizer, chat template and generation config are rebuilt from it."""
    from megatune.checkpoint.gguf import GgufTensors, write_extras

    tensors = GgufTensors(path)
    return Opened(
        "gguf", path, tensors.config, tensors, write_extras=lambda folder: write_extras(tensors, folder)
    )


FORMAT = Format("gguf", "GGUF file", detect, open_gguf)
