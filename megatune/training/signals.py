"""Stop at the edge of a step when the process is asked to end."""

from __future__ import annotations

import signal
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
