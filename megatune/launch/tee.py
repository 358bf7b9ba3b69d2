"""Rank 0's output on the terminal and in its log."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import termios
import tty
from pathlib import Path

_CHUNK = 65536


class Tee:
    """Takes what a process writes to its stdout and stderr, and writes it to this process's own and to a file.

    Where ours is a terminal the process gets one, too, of the same size, so that its progress line works. `ends`: the
    file descriptors for the process; close them with `started` once it has them. `sources`: to wait for and to `copy`.
    """

    def __init__(self, log: Path) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._targets: dict[int, int] = {}
        ends = []
        for target in (1, 2):
            ours, theirs = pty.openpty() if os.isatty(target) else os.pipe()
            if os.isatty(target):
                tty.setraw(theirs)  # the real terminal does what a terminal does
                size = fcntl.ioctl(target, termios.TIOCGWINSZ, bytes(struct.calcsize("HHHH")))
                fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
            os.set_blocking(ours, False)
            self._targets[ours] = target
            ends.append(theirs)
        self.ends = tuple(ends)

    @property
    def sources(self) -> list[int]:
        return list(self._targets)

    def started(self) -> None:
        for descriptor in self.ends:
            os.close(descriptor)

    def copy(self, source: int) -> None:
        """Copy what is there; a source whose last writer is gone is closed and leaves `sources`."""
        while source in self._targets:
            try:
                data = os.read(source, _CHUNK)
            except BlockingIOError:
                return
            except OSError:  # EIO: nobody has the other end of a terminal any more
                data = b""
            if not data:
                os.close(source)
                del self._targets[source]
                return
            _write(self._log, data)
            _write(self._targets[source], data)

    def close(self) -> None:
        """Copy the rest, whoever may still hold the other ends."""
        for source in self.sources:
            self.copy(source)
        for source in self.sources:
            os.close(source)
        self._targets.clear()
        if self._log >= 0:
            os.close(self._log)
            self._log = -1


def _write(target: int, data: bytes) -> None:
    """A terminal that is gone, or a full disk, does not end the run."""
    try:
        while data:
            data = data[os.write(target, data) :]
    except OSError:
        return
