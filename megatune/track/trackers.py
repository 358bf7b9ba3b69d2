"""All trackers of a run behind one object."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol

from megatune.config.schema import Config
from megatune.errors import MegatuneError
from megatune.track.base import Tracker
from megatune.track.console import Console
from megatune.track.logs import RankLog
from megatune.track.metrics import MetricsFile

__all__ = ["Tracker", "Trackers", "build"]

_log = logging.getLogger("megatune")


class _World(Protocol):
    rank: int

    @property
    def is_main(self) -> bool: ...


class Trackers:
    """Rank 0: console, metrics.jsonl, log and the configured services; other ranks: their log alone.

    A service that fails in the middle of a run does not end it: the first failure is a warning, the numbers are in
    metrics.jsonl in any case.
    """

    def __init__(
        self,
        log: RankLog,
        console: Console | None = None,
        metrics: MetricsFile | None = None,
        services: dict[str, Tracker] | None = None,
    ) -> None:
        self._rank_log = log
        self._console = console
        self._metrics = metrics
        self._services = services or {}
        self._silent: set[str] = set()

    def start(self, config: dict[str, Any], resumed_step: int, total_steps: int) -> None:
        """Before the first `log`. `resumed_step`: steps that are done already; lines beyond it are dropped."""
        _log.info("%d of %d steps are done", resumed_step, total_steps)
        if self._metrics is not None:
            self._metrics.start(config, resumed_step)
        for service in self._services.values():
            service.start(config, resumed_step)
        if self._console is not None:
            self._console.begin(total_steps, resumed_step)

    def header(self, facts: dict[str, str]) -> None:
        """Print and log what will run."""
        for name, value in facts.items():
            _log.info("%s: %s", name, value)
        if self._console is not None:
            self._console.header(facts)

    def note(self, text: str) -> None:
        """One line on the console and in the log."""
        _log.info(text)
        if self._console is not None:
            self._console.note(text)

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        """Metrics after `step` finished steps; an evaluation (`eval_loss`) is logged by itself."""
        if self._console is None:
            return
        self._metrics.log(step, metrics)
        for name, service in self._services.items():
            try:
                service.log(step, metrics)
            except Exception as error:
                if name not in self._silent:
                    self._silent.add(name)
                    _log.warning("%s did not take step %d (%s); metrics.jsonl has it", name, step, error)
        self._console.log(step, metrics)
        _log.info("step %d: %s", step, metrics)

    def plot(self, path: Path) -> None:
        """Draw loss.png. A run that is done does not fail for want of a picture: that is a warning."""
        if self._metrics is None:
            return
        from megatune.track.plot import loss_plot

        try:
            loss_plot(self._metrics.path, path)
        except Exception as error:
            _log.warning("%s could not be drawn: %s", path, error)

    def finish(
        self, summary: dict[str, Any], before: list[dict[str, str]], after: list[dict[str, str]]
    ) -> None:
        """Print the result: losses and answers before and after, exports, what to do next."""
        _log.info("summary: %s", summary)
        if self._console is not None:
            self._console.finish(summary, before, after)

    def failed(self, error: BaseException) -> None:
        """The run ends with `error`, which the caller reports: here it goes to the log."""
        if self._console is not None:
            self._console.stop()
        is_ours = isinstance(error, MegatuneError)
        # Not to the console a second time, hence not through the warning handler.
        _log.info("ended by %s: %s", type(error).__name__, error, exc_info=None if is_ours else error)

    def close(self) -> None:
        """Flush and close everything; the logging of the process is as it was before."""
        if self._console is not None:
            self._console.stop()
        for name, service in self._services.items():
            try:
                service.close()
            except Exception as error:
                _log.warning("%s could not be closed: %s", name, error)
        if self._metrics is not None:
            self._metrics.close()
        self._rank_log.close()


def build(config: Config, folder: Path, world: _World) -> Trackers:
    """The trackers of `config.track` for this process. Raises ConfigError where a package is missing."""
    folder = Path(folder)
    if not world.is_main:
        return Trackers(RankLog(folder, world.rank))
    services: dict[str, Tracker] = {}
    track = config.track
    if track.tensorboard:
        from megatune.track.tensorboard import TensorBoard

        services["tensorboard"] = TensorBoard(folder)
    if track.wandb is not None:
        from megatune.track.wandb import WandB

        services["wandb"] = WandB(folder, track.wandb)
    if track.swanlab is not None:
        from megatune.track.swanlab import SwanLab

        services["swanlab"] = SwanLab(folder, track.swanlab)
    if track.mlflow is not None:
        from megatune.track.mlflow import MLflow

        services["mlflow"] = MLflow(folder, track.mlflow)
    return Trackers(RankLog(folder, world.rank), Console(), MetricsFile(folder), services)
