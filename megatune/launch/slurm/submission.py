"""Submissions of a run: which jobs belong to it, and the marks by which its jobs and its user talk.

`<checkpoint.folder>/slurm/<id of the first job>/` holds `job.sbatch` (what was submitted), `jobs/<id>` (a job's number
in its chain) and the marks `done`, `failed`, `stop` and `requeue`; `<checkpoint.folder>/slurm/<id>.out` a job's output.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatune.config.schema import Config
from megatune.errors import ConfigError
from megatune.launch.slurm import client
from megatune.launch.slurm.script import Job, render


@dataclass(frozen=True)
class Submission:
    """One chain of jobs of a run."""

    folder: Path
    first: str

    @property
    def state(self) -> Path:
        return self.folder / "slurm" / self.first

    @property
    def jobs(self) -> list[str]:
        """Ids, in the chain's order."""
        numbers = {path.name: path.read_text().strip() for path in (self.state / "jobs").glob("[0-9]*")}
        return sorted(numbers, key=lambda job: (int(numbers[job] or 0), int(job)))

    def marked(self, mark: str) -> bool:
        return (self.state / mark).exists()

    def mark(self, mark: str) -> None:
        (self.state / mark).write_text("")

    def unmark(self, mark: str) -> None:
        (self.state / mark).unlink(missing_ok=True)


def submissions(folder: Path) -> list[Submission]:
    """All of a run's, oldest first."""
    found = [path.parent for path in (folder / "slurm").glob("*/jobs") if path.parent.name.isdecimal()]
    return [Submission(folder, path.name) for path in sorted(found, key=lambda path: int(path.name))]


def newest(folder: Path) -> Submission:
    """The last one. Raises ConfigError where the run was never submitted."""
    found = submissions(folder)
    if not found:
        raise ConfigError(
            f"checkpoint.folder: no job of {folder} was submitted yet; start with megatune slurm submit"
        )
    return found[-1]


def submit(
    config: Config, path: str | os.PathLike[str], overrides: Sequence[str] = (), after: str | None = None
) -> Submission:
    """Submit the run, as a chain where `slurm.chain` says so; what is submitted is what `render` gives.

    `after`: a dependency, as sbatch takes it. Raises ConfigError where the script cannot be made, sbatch refuses it, or
    jobs of the run still wait or run.
    """
    job = render(config, path, overrides)
    alive = _alive(job.folder)
    if alive:
        raise ConfigError(
            f"checkpoint.folder: {job.folder} has jobs that wait or run ({', '.join(alive)}); two would write into "
            f"one folder: megatune slurm stop first"
        )
    folder = job.folder / "slurm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        script = folder / f".job-{os.getpid()}.sbatch"
        script.write_bytes(job.script)
    except OSError as error:
        raise ConfigError(f"checkpoint.folder: cannot write to {folder}: {error.strerror}") from error
    environ = client.submission_environment(given_options(config))
    try:
        first = client.submit(script, [] if after is None else [f"--dependency={after}"], [], environ)
    except ConfigError:
        script.unlink()
        raise
    submission = Submission(job.folder, first)
    (submission.state / "jobs").mkdir(parents=True, exist_ok=True)
    script.rename(submission.state / "job.sbatch")
    _enter(submission, first, 1)
    _submit_rest(submission, job, config.slurm.chain, environ)
    return submission


def _submit_rest(submission: Submission, job: Job, chain: int, environ: dict[str, str]) -> None:
    """Jobs 2 to `chain`: each begins when the one before has ended, however that was."""
    before = submission.first
    for number in range(2, chain + 1):
        try:
            before = client.submit(
                submission.state / "job.sbatch",
                [f"--dependency=afterany:{before}"],
                [str(number), submission.first],
                environ,
            )
        except ConfigError as error:
            raise ConfigError(
                f"job {number} of {chain}: {error}; jobs {', '.join(submission.jobs)} were submitted"
            ) from error
        _enter(submission, before, number)


def _enter(submission: Submission, job: str, number: int) -> None:
    (submission.state / "jobs" / job).write_text(f"{number}\n")


def given_options(config: Config) -> set[str]:
    """Options of sbatch that the configuration sets."""
    own = {name for name in type(config.slurm).model_fields if getattr(config.slurm, name) not in (None, [])}
    return own | {name.replace("_", "-") for name in config.slurm.options}


def _alive(folder: Path) -> list[str]:
    found = submissions(folder)
    jobs = found[-1].jobs if found else []
    return [state.job for state in client.states(jobs).values() if state.is_alive]


def stop(submission: Submission, *, now: bool) -> list[str]:
    """End a submission: its running job saves and stops, those that wait are cancelled, nothing is requeued.

    `now`: cancel the running job, too, without a new checkpoint. Returns one line for each job that was ended.
    """
    states = client.states(submission.jobs).values()
    submission.mark("stop")
    waiting = [state.job for state in states if state.is_waiting]
    running = [state.job for state in states if state.is_running]
    client.cancel(waiting)
    for job in running:
        if now:
            client.cancel([job])
        else:
            client.signal_script(job)
    how = "cancelled" if now else "asked to save and stop"
    return [f"job {job}: cancelled" for job in waiting] + [f"job {job}: {how}" for job in running]


def requeue(submission: Submission) -> str:
    """Send the newest submission's job back to the queue: a running one saves first, an ended one starts again where
    Slurm still knows it. Returns what was done. Raises ConfigError where nothing can be."""
    states = list(client.states(submission.jobs).values())
    running = [state.job for state in states if state.is_running]
    if running:
        submission.unmark("stop")
        submission.mark("requeue")
        client.signal_script(running[0])
        return f"job {running[0]}: asked to save; it goes back to the queue then"
    waiting = [state.job for state in states if state.is_waiting]
    if waiting:
        raise ConfigError(f"job {waiting[0]} waits in the queue already ({states[0].reason})")
    if submission.marked("done"):
        raise ConfigError(f"{submission.folder}: the run is done; raise train.steps and submit it to go on")
    known = [state.job for state in states if state.state != "UNKNOWN"]
    if not known:
        raise ConfigError(
            "Slurm has forgotten the job; megatune slurm submit goes on from the last checkpoint"
        )
    for mark in ("stop", "failed", "stalled"):
        submission.unmark(mark)
    client.requeue(known[-1])
    return f"job {known[-1]}: requeued"
