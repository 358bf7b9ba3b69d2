"""What a rank is doing, in a small file that its launcher reads: step, phase, when it last moved.

The file is mapped into memory, so a beat is a few stores and no system call, and what was written stays readable after
the rank was killed. Little-endian 64-bit words:

| word | holds |
| --- | --- |
| 0 | `step << 8 | phase`; step: the one being computed, from 1; for save and evaluate the last finished one |
| 1 | time of the last beat, CLOCK_MONOTONIC in nanoseconds (one clock for all processes of a machine) |
| 2 | steps finished by this process |
| 3 | the last finished step of the run |
| 4 | step of the newest checkpoint that this process knows to be there, 0: none |
| 5 | longest time between two beats within a step but the first, in nanoseconds |

Imports no torch.
"""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path

HEARTBEAT_FILE = "MEGATUNE_HEARTBEAT"

PHASES = (
    "start",  # imports, loading, data, until the first step
    "fetch",
    "forward",
    "backward",
    "reduce",  # waiting for gradients and losses of the other ranks
    "optimizer",
    "evaluate",
    "save",  # copying the state
    "checkpoint",  # waiting for the files
    "end",  # answers, exports
)
START, FETCH, FORWARD, BACKWARD, REDUCE, OPTIMIZER, EVALUATE, SAVE, CHECKPOINT, END = range(len(PHASES))
IN_STEP = (FETCH, FORWARD, BACKWARD, REDUCE, OPTIMIZER)
_WORDS = 8
_SIZE = 8 * _WORDS


class Heartbeat:
    """This process's own; without a launcher it is written to memory that nobody reads."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        if path is None:
            memory: mmap.mmap | bytearray = bytearray(_SIZE)
        else:
            with open(path, "r+b") as file:  # made by the launcher, `_SIZE` bytes
                memory = mmap.mmap(file.fileno(), _SIZE)
        self._words = memoryview(memory).cast("Q")
        self._step = 0
        self.phase(START)

    def phase(self, phase: int) -> None:
        """One of the constants above begins, or goes on."""
        words, now = self._words, time.monotonic_ns()
        if words[2] and phase in IN_STEP and now - words[1] > words[5]:
            words[5] = now - words[1]
        words[0] = self._step << 8 | phase
        words[1] = now

    def begin(self, step: int) -> None:
        """Step number `step` (from 1) begins, with fetching its data."""
        self._step = step
        self.phase(FETCH)

    def finished(self, step: int) -> None:
        """The weights are those after `step`."""
        self._words[3] = step
        self._words[2] += 1

    def saved(self, step: int) -> None:
        """The checkpoint of `step` is there."""
        self._words[4] = step


_current: tuple[str | None, Heartbeat] | None = None


def heartbeat() -> Heartbeat:
    """This process's heartbeat, in the file that its launcher named."""
    global _current
    path = os.environ.get(HEARTBEAT_FILE)
    if _current is None or _current[0] != path:
        _current = path, Heartbeat(path)
    return _current[1]


@dataclass(frozen=True)
class Beat:
    """What a file says. `silent`: seconds since the last beat; `longest`: see word 5, in seconds."""

    step: int
    phase: int
    silent: float
    done_here: int
    finished: int
    saved: int
    longest: float

    @property
    def where(self) -> str:
        """For a person: `in step 5, backward`."""
        if self.phase == START:
            return "while starting"
        if self.phase == END:
            return "after the last step"
        return f"{'in' if self.phase in IN_STEP else 'after'} step {self.step}, {PHASES[self.phase]}"


class Reader:
    """The launcher's side: makes the file, and reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._began = time.monotonic_ns()
        path.write_bytes(bytes(_SIZE))
        with open(path, "r+b") as file:
            self._words = memoryview(mmap.mmap(file.fileno(), _SIZE, access=mmap.ACCESS_READ)).cast("Q")

    def read(self, since: float = 0.0) -> Beat:
        """What it says now. `since`: monotonic seconds; a silence before does not count."""
        word, at, done_here, finished, saved, longest = self._words[:6].tolist()
        silent = time.monotonic() - max(since, (at or self._began) / 1e9)
        phase = min(word & 0xFF, END)
        return Beat(word >> 8, phase, max(0.0, silent), done_here, finished, saved, longest / 1e9)
