"""All formats, in the order in which a path is tried against them."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from megatune.checkpoint.convert.base import Format
from megatune.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class _Entry:
    """`module`: of this package, imported when it is needed; `looks_like`: what a folder of it holds, in words."""

    name: str
    module: str
    looks_like: str


# Narrow signs come first: a run folder may hold anything, a DeepSpeed folder is told from Megatron's by its files.
_ENTRIES = (
    _Entry("gguf", "gguf", "a .gguf file"),
    _Entry("peft", "peft", "adapter_config.json (a PEFT adapter)"),
    _Entry(
        "megatune",
        "megatune_run",
        "checkpoints/step-*/manifest.json (a run of megatune, or one of its steps)",
    ),
    _Entry(
        "deepspeed", "deepspeed", "latest and *_model_states.pt, or zero/*/fp32.pt (DeepSpeed, universal)"
    ),
    _Entry("torch_dist", "torch_dist", "iter_*/metadata.json with .metadata (Megatron-Core torch_dist)"),
    _Entry("megatron", "megatron_legacy", "iter_*/mp_rank_* or release/mp_rank_* (Megatron-LM)"),
    _Entry("dcp", "dcp", ".metadata and *.distcp (torch.distributed.checkpoint)"),
    _Entry("hf", "hf", "config.json with *.safetensors or pytorch_model*.bin (Hugging Face)"),
)


def names() -> list[str]:
    """Names of all formats that this installation has."""
    return [entry.name for entry in _ENTRIES if _is_there(entry)]


def targets() -> list[str]:
    """Names of the formats that can be written."""
    return [name for name in names() if named(name).target is not None]


def named(name: str) -> Format:
    """The format of a name. ConfigError for one that does not exist."""
    for entry in _ENTRIES:
        if entry.name == name and _is_there(entry):
            return _load(entry)
    raise ConfigError(f"format {name!r} is not one of {', '.join(names())}")


def find(path: Path) -> Format:
    """The format of what is at `path`. CheckpointError that lists what was looked for where it is none."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    for entry in _ENTRIES:
        if _is_there(entry) and _load(entry).detect(path):
            return _load(entry)
    wanted = "; ".join(f"{entry.name}: {entry.looks_like}" for entry in _ENTRIES if _is_there(entry))
    inside = ", ".join(sorted(item.name for item in path.iterdir())[:8]) if path.is_dir() else "a file"
    raise CheckpointError(
        f"{path}: is no checkpoint that megatune knows (it holds {inside or 'nothing'}); looked for {wanted}"
    )


def _is_there(entry: _Entry) -> bool:
    return importlib.util.find_spec(f"{__package__}.{entry.module}") is not None


def _load(entry: _Entry) -> Format:
    return importlib.import_module(f"{__package__}.{entry.module}").FORMAT
