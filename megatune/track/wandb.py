"""Weights & Biases. Offline where WANDB_MODE or `mode: offline` says so: `wandb sync` uploads later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatune.errors import ConfigError
from megatune.track.base import RunIds, need, public, tags


class WandB:
    """`options`: arguments of wandb.init. A resumed run goes on under the same id."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self._wandb = need("wandb", "wandb")
        self._folder = folder
        self._options = options
        self._run: Any = None

    def start(self, config: dict[str, Any], resumed_step: int) -> None:
        ids = RunIds(self._folder)
        earlier = ids.get("wandb") if resumed_step else None
        options = {"dir": str(self._folder), "config": public(config), **self._options}
        if earlier:
            options = {"id": earlier, "resume": "allow", **options}
        try:
            self._run = self._wandb.init(**options)
        except (
            Exception
        ) as error:  # its own classes differ between versions, and wrong arguments are TypeErrors
            raise ConfigError(
                f"track.wandb: wandb.init failed ({error}); log in with `wandb login`, or add `mode: offline`"
            ) from error
        ids.put("wandb", self._run.id)

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        self._run.log(tags(metrics), step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
