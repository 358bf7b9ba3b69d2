"""How far a conversion is: a bar in a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from typing import Any

_LINE_SECONDS = 10.0


class Progress:
    """`start` a stage of so many bytes, `add` bytes as they go by, `stop`. `quiet`: prints nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._title, self._total, self._done = "", 0, 0
        self._began = self._said = 0.0

    def start(self, title: str, total: int) -> None:
        self.stop()
        self._title, self._total, self._done = title, max(1, total), 0
        self._began = self._said = time.monotonic()
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )
            from rich.progress import Progress as Bar

            columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
            shown = [TextColumn(c) if isinstance(c, str) else c for c in columns]
            self._bar = Bar(*shown, TimeRemainingColumn(), console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(title, total=self._total)

    def add(self, count: int) -> None:
        self._done = min(self._total, self._done + count)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif not self._quiet and time.monotonic() - self._said >= _LINE_SECONDS:
            self._said = time.monotonic()
            self._say()

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif not self._quiet and self._total:
            self._say()
        self._total = 0

    def _say(self) -> None:
        speed = self._done / 2**20 / max(1e-3, time.monotonic() - self._began)
        print(
            f"{self._title}: {self._done / self._total:4.0%} of {self._total / 2**30:.2f} GiB, {speed:,.0f} MiB/s",
            file=sys.stderr,
        )
