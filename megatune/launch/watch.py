"""Telling a run that hangs from one that is slow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatune.training.heartbeat import BACKWARD, END, FORWARD, OPTIMIZER, REDUCE, START, Beat

_TIGHT = (FORWARD, BACKWARD, REDUCE, OPTIMIZER)
_PATIENCE = 5  # times the limit for reading data, evaluating and saving, and for the first step (compiling)
_START_PATIENCE = 4


@dataclass(frozen=True)
class Limits:
    """`hang`: seconds without a beat within a step, 0: never a hang; `collective`: the process groups' timeout."""

    hang: float = 0.0
    collective: float = 1800.0

    def of(self, beat: Beat) -> float:
        """Seconds that this rank may be silent where it stands."""
        if beat.phase in (START, END):
            # A rank that waits for another there is ended by the timeout of its collective.
            return _START_PATIENCE * max(self.hang, self.collective)
        tight = beat.phase in _TIGHT and beat.done_here
        return max(self.hang if tight else _PATIENCE * self.hang, _PATIENCE * beat.longest)


def hanging(beats: Iterable[tuple[int, Beat]], limits: Limits) -> tuple[int, Beat] | None:
    """The rank that holds the others up, from (rank, beat) of all that still run; None: no hang.

    Ranks wait for each other in every step, so a run hangs only when all of them are silent for longer than each may
    be where it stands: one that evaluates, compiles or reads slowly excuses those that wait for it. Of them the least
    advanced one is named.
    """
    beats = list(beats)
    if not limits.hang or not beats or any(beat.silent <= limits.of(beat) for _, beat in beats):
        return None
    return min(beats, key=lambda item: (item[1].step, item[1].phase, -item[1].silent, item[0]))
