"""How long before its end a job must be told: long enough to finish a step and save."""

from __future__ import annotations

import json
from pathlib import Path

from megatune.config.schema import Config
from megatune.config.slurm import time_limit_seconds

# The run writes here how long its longest save took, from the signal's notice to the files' being there.
SAVE_TIME = "save_time.json"
BEFORE_THE_FIRST_SAVE = 300
_SHORTEST = 60
_MARGIN = 60


def measured_save(folder: str | Path) -> float | None:
    """Seconds that the longest save of this run took so far; None where it has not saved yet."""
    try:
        seconds = json.loads((Path(folder) / SAVE_TIME).read_text("utf-8"))["seconds"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(seconds) if isinstance(seconds, int | float) and 0 <= seconds < 1e6 else None


def grace_seconds(config: Config, folder: str | Path) -> int:
    """Seconds before the time limit at which Slurm tells the job: `slurm.grace`, or twice the longest save and a
    minute; never more than a quarter of the time limit, so that something is left to train in. (Slurm itself may come
    up to a minute early.)"""
    slurm = config.slurm
    if slurm.grace != "auto":
        return slurm.grace
    saved = measured_save(folder)
    seconds = BEFORE_THE_FIRST_SAVE if saved is None else max(_SHORTEST, round(2 * saved) + _MARGIN)
    limit = None if slurm.time is None else time_limit_seconds(slurm.time)
    if limit:
        seconds = min(seconds, max(10, limit // 4))
    return min(seconds, 65000)
