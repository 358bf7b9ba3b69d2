"""Stop at the edge of a step when the process is asked to end. Imports no torch."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """While active, the stop signals only set a flag; a second SIGINT interrupts at once (KeyboardInterrupt)."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self.received is not None

    def __enter__(self) -> StopFlag:
        for number in STOP_SIGNALS:
            try:
                self._previous[number] = signal.signal(number, self._set)
            except ValueError:  # not in the main thread (a notebook, a server): signals stay their owner's
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _set(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


_active: StopFlag | None = None


@contextmanager
def stop_requests() -> Iterator[StopFlag]:
    """The flag of this process, set by whatever signal came since the outermost of these began.

    The command line begins one before torch is imported, so that a signal during loading is not lost: the run then
    stops after its first step.
    """
    global _active
    if _active is not None:
        yield _active
        return
    with StopFlag() as _active:
        try:
            yield _active
        finally:
            _active = None
