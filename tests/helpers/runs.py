"""Configurations of tiny runs, and reading back what they wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatune.config.schema import Config


def tiny_config(model: Path, data: tuple[Path, Path], folder: Path, **changes: Any) -> Config:
    """A run of 4 steps in fp32 on the tiny model. `changes`: values by dotted key, dots written as two underscores
    (`train__steps=8`), or whole sections."""
    settings: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "fp32"},
        "method": {"type": "full"},
        "data": {"train": [str(data[0])], "eval": str(data[1]), "seq_length": 96},
        "parallel": {"zero": 3},
        "train": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 1, "seed": 7, "eval_first": False},
        "optim": {"lr": 1e-3, "warmup": 2, "weight_decay": 0.1},
        "checkpoint": {"folder": str(folder)},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            settings[section][name] = value
        else:
            settings[section] = value
    return Config.model_validate(settings)


LORA = {"type": "lora", "rank": 4, "alpha": 8.0}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """Training loss by step; asserts that no step is missing or twice there."""
    rows = [row for row in metrics(folder) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def grad_norms(folder: Path) -> list[float]:
    """Gradient norm before clipping, by step. AdamW hides a wrong scale of the gradient; this does not."""
    return [row["grad_norm"] for row in metrics(folder) if "loss" in row]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in a folder."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found
