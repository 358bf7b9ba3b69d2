"""A run's folder: where things lie, whose run it is, and whether it is done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from megatune.config.loader import dump_config
from megatune.config.schema import Config
from megatune.errors import ConfigError

# Keys that may change between two starts of one run: they do not decide which numbers come out of it, or the user
# changes them on purpose to go on longer.
_FREE = ("track", "launch", "slurm", "ops", "parallel", "checkpoint", "data.cache", "model.cache")
_FREE_TRAIN = {
    "steps",
    "epochs",
    "eval_every",
    "eval_first",
    "log_every",
    "early_stop",
    "samples",
    "sample_tokens",
}
_FREE_TRAIN |= {"micro_batch_size", "compile", "deterministic"}


class RunFolder:
    """Paths of one run (`config.yaml`, `metrics.jsonl`, `loss.png`, `logs/`, `checkpoints/`, exports)."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.loss_plot = self.path / "loss.png"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.summary = self.path / "summary.json"
        self.samples = self.path / "samples.json"

    def export(self, what: str) -> Path:
        return self.path / what

    def claim(self, config: Config) -> None:
        """Make the folder this run's own. Raises ConfigError where another run's checkpoints or results lie in it; one
        that ended before its first checkpoint has nothing to lose and gives way."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"checkpoint.folder: {self.path} is a file; name a folder")
        holds_results = any(self.checkpoints.glob("step-*")) or self.summary.exists()
        if self.config.exists() and holds_results:
            differences = _differences(self.config, config)
            if differences:
                raise ConfigError(
                    f"checkpoint.folder: {self.path} holds another run ({'; '.join(differences)}); "
                    f"choose another folder, or remove it to start anew"
                )
        elif holds_results:
            raise ConfigError(
                f"checkpoint.folder: {self.path} holds checkpoints but no config.yaml, so it is not this run's; "
                f"choose another folder"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.config, dump_config(config))
        except OSError as error:
            raise ConfigError(f"checkpoint.folder: cannot write to {self.path}: {error.strerror}") from error

    def finished(self, config: Config) -> dict[str, Any] | None:
        """The summary of a run that reached its goal and wrote its exports; None where work is left."""
        summary = read_json(self.summary)
        return (
            summary if summary and summary.get("finished") and summary.get("goal") == goal(config) else None
        )


def goal(config: Config) -> dict[str, Any]:
    """What decides when a run ends: a run that was done under another goal goes on."""
    train = config.train
    early = train.early_stop.model_dump() if train.early_stop else None
    return {
        "steps": train.steps,
        "epochs": train.epochs,
        "early_stop": early,
        "export": config.checkpoint.export,
    }


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a small file of ours; None where it is not there or was cut off."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def write_atomically(path: Path, text: str) -> None:
    """Write so that a reader, or a crash, sees the old text or the new one and nothing between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


def _differences(path: Path, config: Config) -> list[str]:
    try:
        before = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is damaged and cannot say whose run this is; remove the folder") from error
    now = yaml.safe_load(dump_config(config))
    old, new = _flat(before or {}), _flat(now)
    changed = [
        key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and not _free(key)
    ]
    return [f"{key}: {old.get(key)!r} there, {new.get(key)!r} here" for key in changed]


def _free(key: str) -> bool:
    section, _, rest = key.partition(".")
    if section == "train":
        return rest.split(".")[0] in _FREE_TRAIN
    return any(key == free or key.startswith(free + ".") for free in _FREE)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found.update(_flat(inner, f"{prefix}.{key}" if prefix else str(key)))
    return found
