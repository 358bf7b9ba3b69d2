"""How long before its end a job must be told: long enough to finish a step and save."""

from __future__ import annotations

from pathlib import Path

from megatune.config.schema import Config
from megatune.config.slurm import time_limit_seconds
from megatune.training.folder import read_json
from megatune.training.grace import GRACE_FILE

BEFORE_THE_FIRST_SAVE = 300
_SHORTEST = 60
_LONGEST = 65000  # sbatch takes no more


def measured_need(folder: Path) -> float | None:
    """Seconds that this run needs from the notice to its end, by its own measured steps and saves; None before its
    first save."""
    seconds = (read_json(folder / GRACE_FILE) or {}).get("grace_seconds")
    return float(seconds) if isinstance(seconds, int | float) and 0 < seconds < _LONGEST else None


def grace_seconds(config: Config, folder: Path) -> int:
    """Seconds before the time limit at which Slurm tells the job: `slurm.grace`, or what the run needs and a fifth
    more; never more than a quarter of the time limit, so that something is left to train in. (Slurm itself may come up
    to a minute early.)"""
    slurm = config.slurm
    if slurm.grace != "auto":
        return slurm.grace
    need = measured_need(folder)
    seconds = BEFORE_THE_FIRST_SAVE if need is None else max(_SHORTEST, round(1.2 * need))
    limit = None if slurm.time is None else time_limit_seconds(slurm.time)
    if limit:
        seconds = min(seconds, max(10, limit // 4))
    return min(seconds, _LONGEST)
