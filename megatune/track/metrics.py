"""metrics.jsonl: one JSON object a line, always written, the record that everything else can be drawn from."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import IO, Any

from megatune.errors import TrainingError


class MetricsFile:
    """Appends to `<folder>/metrics.jsonl`, each line at once on its way to the disk.

    A resumed run first cuts off what lies beyond its step (atomically), so that the file ends up with the lines of a
    run that was never interrupted. A value that is not finite is written as null: JSON has no other word for it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self._file: IO[str] | None = None

    def start(self, config: dict[str, Any], resumed_step: int) -> None:
        try:
            self._cut(resumed_step)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (open for the whole run)
        except OSError as error:
            raise TrainingError(
                f"{self.path} cannot be written ({error.strerror}); free space or repair it"
            ) from error

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        values = {
            name: value if value is None or math.isfinite(value) else None for name, value in metrics.items()
        }
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainingError(
                f"step {step}: {self.path} cannot be written ({error.strerror}); checkpoints are whole, free space and "
                f"start again"
            ) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _cut(self, resumed_step: int) -> None:
        kept = [line for line in read_metrics(self.path) if resumed_step and line["step"] <= resumed_step]
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with open(unfinished, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl; a line that was cut off by a crash is left out, a missing file has none."""
    lines = []
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            lines.append(value)
    return lines
