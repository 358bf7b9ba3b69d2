"""Whether a run that failed is started again."""

from __future__ import annotations

from dataclasses import dataclass

from megatune.launch.report import Death

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0


@dataclass
class Restarts:
    """`limit`: starts after a failure in a row that bring the run no further. `furthest` and `newest`: last finished
    step and newest checkpoint that any start has reached."""

    limit: int
    used: int = 0
    total: int = 0
    furthest: int = 0
    newest: int = 0
    _last: tuple[int, str] | None = None

    def seen(self, finished: int, saved: int) -> None:
        """How far the run is now. Getting further than any start before clears the count."""
        if finished > self.furthest or saved > self.newest:
            self.furthest, self.newest = max(finished, self.furthest), max(saved, self.newest)
            self.used = 0

    def stop_reason(self, death: Death) -> str | None:
        """After a failure: why the run is not started again; None: it is, and counted."""
        # A process that dies while it starts may have met a port or a file system that was not ready: only the same
        # error twice says that it will not get better. Within a step, the step is what it always meets.
        what = (death.step, "" if death.step else death.text.strip().rpartition("\n")[2] or str(death.code))
        again, self._last = what == self._last, what
        if self.limit == 0:
            return ""
        if again and death.step:
            return f"step {death.step} failed twice in a row; mend what the report says, then start the run again"
        if again and death.is_reported:
            return "the start has failed twice with the same error"
        if self.used >= self.limit:
            return f"{self.limit} restarts brought it no further than step {self.furthest} (launch.restarts)"
        self.used += 1
        self.total += 1
        return None

    @property
    def pause(self) -> float:
        """Seconds before the next start."""
        return min(LONGEST_PAUSE, FIRST_PAUSE * 4 ** max(0, self.used - 1))
