"""Models for inference, in one process: the public `load_model` and `export_hf`."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megatune import adapters, checkpoint, models, ops
from megatune.checkpoint.sources import read_json
from megatune.config.schema import LoraMethod
from megatune.errors import CheckpointError, ConfigError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> models.CausalLM:
    """A module that maps token ids `[batch, seq]` (int64) to logits `[batch, seq, vocab]`.

    `path`: Hugging Face folder, GGUF file, hub name, `package:NAME`, or a PEFT LoRA folder (its base model is loaded
    too). `dtype`: of weights and logits; default bf16 on a GPU, else fp32. `device`: default the GPU where there is
    one. Raises CheckpointError or ConfigError where the folder cannot be used.
    """
    where = torch.device(device) if device else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = _dtype(dtype, where)
    adapter = Path(path) / "adapter_config.json"
    base = str(path)
    method = None
    if adapter.is_file():
        settings = read_json(adapter)
        base = settings.get("base_model_name_or_path")
        if not base:
            raise CheckpointError(
                f"{adapter} names no base model (base_model_name_or_path); merge it or add the name"
            )
        method = checkpoint.peft_method(adapter.parent)
    folder = checkpoint.resolve_model(base)
    ops.configure({}, where)
    model = _build(folder, method, kind)
    weights = models.whole_weights(model.to_empty(device=where))
    checkpoint.load_pretrained(weights, folder.spec, folder)
    if method is not None:
        checkpoint.load_peft(weights, model, adapter.parent)
    wrapped = models.CausalLM(model)
    wrapped.folder = folder
    return wrapped.eval()


def export_hf(model: models.CausalLM, folder: str | os.PathLike[str]) -> Path:
    """Write a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` opens with equal logits; adapters are
    merged, tokenizer and chat template come along. `model`: from `load_model`. Returns the folder."""
    source = getattr(model, "folder", None)
    decoder = model.decoder if isinstance(model, models.CausalLM) else model
    checkpoint.export_hf(models.whole_weights(decoder), decoder, Path(folder), source=source, merge=True)
    return Path(folder)


def _dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    if dtype is None or dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype: {dtype!r} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _build(folder: checkpoint.ModelFolder, method: LoraMethod | None, dtype: torch.dtype) -> models.Decoder:
    model = models.build(folder.spec).requires_grad_(False)  # for inference: every weight in `dtype`
    if method is not None:
        adapters.attach(model, method)
    models.set_dtypes(model, dtype)
    return model
