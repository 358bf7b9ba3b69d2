"""TensorBoard event files in `<folder>/tensorboard`, written without TensorFlow and without torch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from megatune.track.base import need, tags


class TensorBoard:
    """Scalars, flushed every few seconds. A resumed run opens a file of its own, which begins with the mark that makes
    TensorBoard forget what earlier files say about later steps."""

    def __init__(self, folder: Path) -> None:
        writer = need("tensorboard.summary.writer.event_file_writer", "tensorboard", "tensorboard")
        self._event = need("tensorboard.compat.proto.event_pb2", "tensorboard", "tensorboard")
        self._summary = need("tensorboard.compat.proto.summary_pb2", "tensorboard", "tensorboard")
        self._open = lambda: writer.EventFileWriter(str(folder / "tensorboard"), flush_secs=10)
        self._writer: Any = None

    def start(self, config: dict[str, Any], resumed_step: int) -> None:
        self._writer = self._open()
        begin = self._event.SessionLog(status=self._event.SessionLog.START)
        first_step = resumed_step + 1 if resumed_step else 0
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=first_step, session_log=begin))

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        values = [self._summary.Summary.Value(tag=tag, simple_value=v) for tag, v in tags(metrics).items()]
        summary = self._summary.Summary(value=values)
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
