"""`megatune doctor`, however it is started: alone it starts a rank for each GPU here. Imports no torch."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatune.config import load_config
from megatune.errors import ConfigError
from megatune.launch import mpi
from megatune.launch.agent import Job, run_job
from megatune.launch.environment import already_launched, gpu_count, rank_variables
from megatune.launch.preflight import local_processes


def start(path: str | None, overrides: Sequence[str], nproc: int | None, as_json: bool) -> int:
    """Examine the machines on which a run of the configuration at `path` (None: any run) would run; returns the exit
    code: 0 go, 2 no go."""
    if path is not None and "=" in path and not Path(path).exists():
        raise ConfigError(f"{path}: give a configuration before KEY=VALUE pairs")
    words = [*([path] if path is not None else []), *overrides, *(["--json"] if as_json else [])]
    command = [sys.executable, "-m", "megatune", "doctor", *words]
    if mpi.usable():
        return mpi.run(lambda count: Job(command, 1, _logs()))
    config = load_config(path, overrides) if path is not None else None
    if not already_launched():
        processes = nproc or (local_processes(config) if config is not None else gpu_count()) or 1
        if processes > 1:
            logs = _logs()
            code = run_job(Job(command, processes, logs))
            if code in (0, 2):
                shutil.rmtree(logs, ignore_errors=True)
            return code
    os.environ.update(rank_variables())
    from megatune.launch.doctor import doctor

    return doctor(config, as_json=as_json)


def _logs() -> Path:
    return Path(tempfile.mkdtemp(prefix="megatune-doctor-"))
