"""SwanLab. Offline where SWANLAB_MODE or `mode: offline` (or `local`) says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatune.errors import ConfigError
from megatune.track.base import RunIds, need, public, tags


class SwanLab:
    """`options`: arguments of swanlab.init. A resumed run goes on under the same id where the mode knows ids."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self._swanlab = need("swanlab", "swanlab")
        self._folder = folder
        self._options = options
        self._started = False

    def start(self, config: dict[str, Any], resumed_step: int) -> None:
        ids = RunIds(self._folder)
        earlier = ids.get("swanlab") if resumed_step else None
        logs = self._folder / "swanlab"
        logs.mkdir(parents=True, exist_ok=True)
        options = {"logdir": str(logs), "config": public(config), **self._options}
        if earlier:
            options = {"id": earlier, "resume": "allow", **options}
        try:
            run = self._swanlab.init(**options)
        except (
            Exception
        ) as error:  # its own classes differ between versions, and wrong arguments are TypeErrors
            raise ConfigError(
                f"track.swanlab: swanlab.init failed ({error}); log in with `swanlab login`, or add `mode: offline`"
            ) from error
        self._started = True
        run_id = getattr(getattr(run, "public", None), "run_id", None) or getattr(run, "id", None)
        if isinstance(run_id, str) and run_id:
            ids.put("swanlab", run_id)

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        self._swanlab.log(tags(metrics), step=step)

    def close(self) -> None:
        if self._started:
            self._swanlab.finish()
