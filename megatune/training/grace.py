"""How long a run takes to stop: measured, and left where a scheduler's script finds it (`grace.json`)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from megatune.training.folder import write_atomically

GRACE_FILE = "grace.json"
MARGIN = 15.0  # seconds: for the notice to arrive, and for the processes to end


@dataclass
class Grace:
    """Longest step, save (from its start until the files were there) and evaluation of this run so far, in seconds.

    What is needed between the notice and the end: a step and an evaluation that have just begun, a save under way, one
    of the finished step, and a margin.
    """

    folder: Path
    step_seconds: float = 0.0
    save_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    _written: float = 0.0

    @property
    def grace_seconds(self) -> int:
        return math.ceil(self.step_seconds + self.evaluate_seconds + 2 * self.save_seconds + MARGIN)

    def write(self) -> bool:
        """Write the file where the need has grown by a twentieth; True where it was written. Nothing is written
        before the first save: what is not known yet must not look small."""
        if not self.save_seconds or self.grace_seconds <= 1.05 * self._written:
            return False
        self._written = self.grace_seconds
        names = ("save_seconds", "step_seconds", "evaluate_seconds", "grace_seconds")
        text = json.dumps({name: round(getattr(self, name), 3) for name in names})
        write_atomically(self.folder / GRACE_FILE, text)
        return True
