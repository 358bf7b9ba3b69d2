"""How far a conversion is: a bar in a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatune.checkpoint.convert.core import Result

_LINE_SECONDS = 10.0
_BAR_SECONDS = 0.1
_SHOWN = 12


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
            self._bar = Bar(*shown, TimeRemainingColumn(), console=Console(stderr=True), auto_refresh=False)
            self._bar.start()
            self._task = self._bar.add_task(title, total=self._total)

    def add(self, count: int) -> None:
        self._done = min(self._total, self._done + count)
        if self._quiet or time.monotonic() - self._said < (
            _LINE_SECONDS if self._bar is None else _BAR_SECONDS
        ):
            return
        self._said = time.monotonic()
        if self._bar is None:
            self._say()
        else:  # not by a thread: processes are forked from this one
            self._bar.update(self._task, completed=self._done, refresh=True)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
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


def show(result: Result) -> None:
    """Print what a conversion did: counts, and the tensors that did not come through one to one."""
    counts = Counter(line.what for line in result.report)
    said = ", ".join(f"{count} {what}" for what, count in counts.most_common())
    step = "" if result.step is None else f" of step {result.step}"
    proof = "; every tensor read back and equal" if result.verified else ""
    print(
        f"{result.kind}{step} -> {result.to}: {result.tensors} tensors, {result.bytes / 2**30:.3f} GiB ({said}){proof}"
    )
    if result.resumed:
        print(f"{result.resumed} parts were there already, from a conversion that was cut")
    odd = [line for line in result.report if line.what != "mapped" or line.detail]
    for line in odd[:_SHOWN]:
        print(f"  {line.what:8} {line.tensor}" + (f": {line.detail}" if line.detail else ""))
    if len(odd) > _SHOWN:
        print(f"  ... and {len(odd) - _SHOWN} more lines in megatune-digests.json")
    print(f"wrote {result.destination} in {result.seconds:.1f} s")
