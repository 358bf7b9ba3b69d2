"""Start the processes of a run on this machine, and end them together: the agent of a job of one node."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatune.launch import codes
from megatune.launch.agent import Job, run_job
from megatune.launch.environment import already_launched, gpu_count, rank_variables, usable_cores
from megatune.launch.watch import Limits

__all__ = ["already_launched", "gpu_count", "rank_variables", "run_local", "usable_cores"]


def run_local(
    argv: Sequence[str],
    nproc: int,
    *,
    env: Mapping[str, str] | None = None,
    log_folder: str | os.PathLike[str] | None = None,
    command: Sequence[str] | None = None,
    grace: float = 4.0,
    restarts: int = 0,
    limits: Limits | None = None,
) -> int:
    """Run `python -m megatune *argv` in `nproc` processes until all have ended; returns the exit code.

    0 where all ended well, 75 where they stopped on request, else as launch/codes.py says; without restarts, the code
    of the rank that failed first (128 + signal where it was killed). Its error, and only its, is printed to stderr. A
    failed rank ends the others: SIGTERM, after `grace` seconds SIGKILL. SIGINT, SIGTERM and SIGUSR1 are forwarded once
    each; a second SIGINT is forwarded and starts the grace time, a third kills at once.

    `env`: added to this process's environment. `log_folder`: for `gen-<G>/rank-<r>.log` (default: a temporary folder,
    which stays only after a failure); rank 0 writes to this process's stdout and stderr, too. `command`: instead of
    `python -m megatune`. `restarts`: see `Restarts`; `limits`: when ranks hang. Call it from the main thread.
    """
    own_folder = log_folder is None
    logs = Path(tempfile.mkdtemp(prefix="megatune-logs-") if own_folder else log_folder)
    job = Job(
        command=[*(command or (sys.executable, "-m", "megatune")), *argv],
        nproc=nproc,
        logs=logs,
        env=env or {},
        restarts=restarts,
        limits=limits or Limits(),
        grace=grace,
    )
    code = run_job(job)
    if own_folder and code in codes.CLEAN:
        shutil.rmtree(logs)
    return code
