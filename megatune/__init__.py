"""megatune fine-tunes very large language models on GPU clusters.

`load_config(path, overrides)`, `train(config)`, `load_model(path)` and `export_hf(model, folder)` are what the
command line itself calls. Nothing heavy is imported before one of them is used.
"""

from __future__ import annotations

from typing import Any

from megatune.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MegatuneError,
    ParallelError,
    TrainingError,
)

__version__ = "0.1.0"

_LAZY = {
    "Config": "megatune.config",
    "load_config": "megatune.config",
    "train": "megatune.training",
    "TrainResult": "megatune.training",
    "load_model": "megatune.serve.load",
    "export_hf": "megatune.serve.load",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "MegatuneError",
    "ParallelError",
    "TrainingError",
    "__version__",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'megatune' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
