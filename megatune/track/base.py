"""What every tracker has in common."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from megatune.errors import ConfigError


class Tracker(Protocol):
    """Takes a run's numbers. Rank 0 alone has trackers.

    `start` once, before any `log`: `config` is the run's resolved configuration, `resumed_step` the steps that are
    done already (0: a new run); what was logged beyond it belongs to steps that will be done again. `log` takes
    metrics after `step` finished steps; None stands for a value that this machine cannot give. `close` once.
    """

    def start(self, config: dict[str, Any], resumed_step: int) -> None: ...

    def log(self, step: int, metrics: dict[str, float | None]) -> None: ...

    def close(self) -> None: ...


def tags(metrics: dict[str, float | None]) -> dict[str, float]:
    """Metrics under the names that dashboards group by: `loss` -> `train/loss`, `eval_loss` -> `eval/loss`."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": float(value)
        for name, value in metrics.items()
        if value is not None
    }


def need(module: str, key: str, package: str | None = None) -> ModuleType:
    """Import a tracker's package. Raises ConfigError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"track.{key}: the package {package or module} cannot be imported ({error}); pip install "
            f"{package or module}, or remove track.{key}"
        ) from error


def public(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without the trackers' own section, which may hold addresses with passwords."""
    return {key: value for key, value in config.items() if key != "track"}


class RunIds:
    """Ids under which a service knows this run, kept in the run's folder so that a resumed run goes on there."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "trackers.json"

    def get(self, service: str) -> str | None:
        return self._all().get(service)

    def put(self, service: str, run_id: str) -> None:
        unfinished = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        unfinished.write_text(json.dumps({**self._all(), service: run_id}))
        os.replace(unfinished, self._path)

    def _all(self) -> dict[str, str]:
        try:
            return json.loads(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return {}
