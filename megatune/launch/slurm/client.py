"""Slurm's commands: submit, ask, signal, cancel. Their output is parsed by fields that all releases print."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatune.errors import ConfigError

_SECONDS = 60
# What a job's shell holds of its own allocation must not decide about the next one's.
_NOT_PASSED_ON = re.compile(r"SLURM_(?!CONF$|CLUSTERS$)|SLURMD_|SBATCH_")
_FIELDS = ("JobID", "State", "RestartCnt", "Reason", "NodeList", "TimeUsed", "TimeLeft", "exit_code")
# Kept of the user's own defaults: where to run and who pays, unless the configuration says it.
_DEFAULTS = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_TIMELIMIT": "time",
}
WAITING = {
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "SPECIAL_EXIT",
    "RESV_DEL_HOLD",
}
RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}


@dataclass(frozen=True)
class JobState:
    """A job as Slurm sees it. `state`: Slurm's word, or UNKNOWN where it has forgotten the job."""

    job: str
    state: str
    restarts: int = 0
    reason: str = ""
    nodes: str = ""
    used: str = ""
    left: str = ""
    exit_code: str = ""

    @property
    def is_waiting(self) -> bool:
        return self.state in WAITING

    @property
    def is_running(self) -> bool:
        return self.state in RUNNING

    @property
    def is_alive(self) -> bool:
        return self.is_waiting or self.is_running


def call(*argv: str, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands; its exit code is the caller's to look at. Raises ConfigError where it is not
    installed or does not answer in a minute."""
    if shutil.which(argv[0]) is None:
        raise ConfigError(f"{argv[0]} is not on this machine's PATH; run this on a login node of the cluster")
    try:
        return subprocess.run(
            argv, env=environ, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{argv[0]} did not answer in {_SECONDS} s; is Slurm's controller up?") from None


def submission_environment(given: Iterable[str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for sbatch: without the variables of a job that this shell may be in, and without those that
    would override what the script says. `given`: options that the configuration sets."""
    given = set(given)
    kept = {name: value for name, value in environ.items() if not _NOT_PASSED_ON.match(name)}
    for name, option in _DEFAULTS.items():
        if name in environ and option not in given:
            kept[name] = environ[name]
    return kept


def submit(script: Path, options: Sequence[str], arguments: Sequence[str], environ: Mapping[str, str]) -> str:
    """Submit a script; returns the job's id. Raises ConfigError with sbatch's own words where it refuses."""
    done = call("sbatch", "--parsable", *options, str(script), *arguments, environ=environ)
    match = re.match(r"(\d+)(?:;|$)", done.stdout.strip())
    if done.returncode or match is None:
        raise ConfigError(f"sbatch refused the job: {_said(done)}")
    return match[1]


def states(jobs: Sequence[str]) -> dict[str, JobState]:
    """What Slurm knows of these jobs, by id: the controller first, then the accounting, if there is one."""
    found: dict[str, JobState] = {}
    if not jobs:
        return found
    layout = ",".join(f"{name}:|" for name in _FIELDS)
    # One unknown id among several is left out; a single one is an error. Either way there is a line for each known.
    done = call("squeue", "--noheader", "--states=all", f"--jobs={','.join(jobs)}", f"--Format={layout}")
    for line in done.stdout.splitlines():
        parts = [part.strip() for part in line.split("|")]
        if len(parts) >= len(_FIELDS) and parts[0] in jobs:
            job, state, restarts, *rest = parts[: len(_FIELDS)]
            found[job] = JobState(job, state, int(restarts) if restarts.isdecimal() else 0, *rest)
    missing = [job for job in jobs if job not in found]
    found.update(_accounted(missing) if missing else {})
    return {job: found.get(job, JobState(job, "UNKNOWN")) for job in jobs}


def _accounted(jobs: Sequence[str]) -> dict[str, JobState]:
    if shutil.which("sacct") is None:
        return {}
    fields = "JobIDRaw,State,NodeList,Elapsed,ExitCode"
    done = call("sacct", "-X", "-n", "-P", f"--jobs={','.join(jobs)}", f"--format={fields}")
    found = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        parts = line.split("|")
        if len(parts) == 5 and parts[0] in jobs:
            job, state, nodes, used, code = parts
            found[job] = JobState(job, state.split()[0] if state else "UNKNOWN", 0, "", nodes, used, "", code)
    return found


def signal_script(job: str) -> None:
    """Tell the job's script to save and stop. Raises ConfigError where Slurm will not."""
    _must("scancel", "--batch", "--signal=USR1", job)


def cancel(jobs: Sequence[str]) -> None:
    if jobs:
        _must("scancel", *jobs)


def requeue(job: str) -> None:
    _must("scontrol", "requeue", job)


def _must(*argv: str) -> None:
    done = call(*argv)
    if done.returncode:
        raise ConfigError(f"{' '.join(argv)}: {_said(done)}")


def _said(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return "; ".join(lines[-3:]) or f"exit code {done.returncode}"
