"""Weights and training state, in and out: model folders, exports, adapters, layout-free checkpoints."""

from megatune.checkpoint.hf import export_hf, hf_tensors
from megatune.checkpoint.peft import export_peft, load_peft, merge_peft, peft_method
from megatune.checkpoint.pretrained import load_pretrained
from megatune.checkpoint.resolve import ModelFolder, resolve_model
from megatune.checkpoint.sources import SafetensorsFolder, TensorSource, weights_digest
from megatune.checkpoint.store import (
    check_space,
    clean,
    load,
    newest,
    prune,
    required_bytes,
    restore,
    save,
    verify,
)
from megatune.checkpoint.writer import PendingSave

__all__ = [
    "ModelFolder",
    "PendingSave",
    "SafetensorsFolder",
    "TensorSource",
    "check_space",
    "clean",
    "export_hf",
    "export_peft",
    "hf_tensors",
    "load",
    "load_peft",
    "load_pretrained",
    "merge_peft",
    "newest",
    "peft_method",
    "prune",
    "required_bytes",
    "resolve_model",
    "restore",
    "save",
    "verify",
    "weights_digest",
]
