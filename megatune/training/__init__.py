"""Training: the loop and what it is wired from.

The room is not called `train` because `megatune.train` is the public function. Nothing here imports torch before it is
used: the process that only starts workers reads run folders too.
"""

from __future__ import annotations

from typing import Any

# EX_TEMPFAIL of sysexits: stopped cleanly with a committed checkpoint; start again to go on.
STOPPED_EXIT_CODE = 75

_LAZY = {
    "StepResult": "megatune.training.step",
    "TrainResult": "megatune.training.run",
    "Trainer": "megatune.training.step",
    "evaluate": "megatune.training.step",
    "train": "megatune.training.run",
}

__all__ = ["STOPPED_EXIT_CODE", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'megatune.training' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
