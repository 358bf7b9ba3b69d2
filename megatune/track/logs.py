"""Every process writes its own log; warnings also reach the console, from rank 0."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_PYTHON_WARNINGS = "py.warnings"


class RankLog:
    """Sends Python's logging (level INFO and above) and warnings to `<folder>/logs/rank-00000.log`, until `close`.

    The file is appended to: a resumed run's log goes on. On rank 0 records of level WARNING and above are also printed
    to stderr, but for Python's own warnings (of libraries, mostly), which stay in the file.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / "logs" / f"rank-{rank:05d}.log"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(self.path, encoding="utf-8")
        file.setFormatter(logging.Formatter(_FORMAT))
        self._handlers: list[logging.Handler] = [file]
        if rank == 0:
            self._handlers.append(_Stderr(logging.WARNING))
        root = logging.getLogger()
        self._level = root.level
        root.setLevel(min(logging.INFO, root.level or logging.INFO))
        for handler in self._handlers:
            root.addHandler(handler)
        logging.captureWarnings(True)

    def close(self) -> None:
        root = logging.getLogger()
        for handler in self._handlers:
            root.removeHandler(handler)
            handler.close()
        self._handlers.clear()
        root.setLevel(self._level)
        logging.captureWarnings(False)


class _Stderr(logging.Handler):
    """Prints to whatever sys.stderr is at the time: a live progress line puts itself there."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != _PYTHON_WARNINGS:
            print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)
