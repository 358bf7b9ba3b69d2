"""Weights and training state, in and out: model folders, exports, adapters, layout-free checkpoints."""

from megatune.checkpoint.hf import export_hf
from megatune.checkpoint.peft import export_peft, load_peft, merge_peft, peft_method
from megatune.checkpoint.pretrained import load_pretrained
from megatune.checkpoint.resolve import ModelFolder, resolve_model
from megatune.checkpoint.sources import SafetensorsFolder, TensorSource, weights_digest
from megatune.checkpoint.store import (
    Keep,
    Saver,
    best,
    check_space,
    clean,
    load,
    newest,
    prune,
    restore,
    save,
    steps,
    verify,
    written_bytes,
)
from megatune.checkpoint.writer import PendingSave

__all__ = [
    "Keep",
    "ModelFolder",
    "PendingSave",
    "SafetensorsFolder",
    "Saver",
    "TensorSource",
    "best",
    "check_space",
    "clean",
    "export_hf",
    "export_peft",
    "load",
    "load_peft",
    "load_pretrained",
    "merge_peft",
    "newest",
    "peft_method",
    "prune",
    "resolve_model",
    "restore",
    "save",
    "steps",
    "verify",
    "weights_digest",
    "written_bytes",
]
