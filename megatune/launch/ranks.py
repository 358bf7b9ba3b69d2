"""The processes of one node in one start of a run.

Each is `python -m megatune ARGUMENTS` with torchrun's environment variables, in a process group of its own (so that
Ctrl-C reaches the agent alone, which forwards it once), and is killed by the kernel should the agent die.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from megatune.launch import codes
from megatune.launch.report import FAILURE_FILE, MAX_TEXT, Failure, recorded
from megatune.launch.tee import Tee
from megatune.training.heartbeat import HEARTBEAT_FILE, Reader

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_TAIL_LINES = 20
_PR_SET_PDEATHSIG = 1


class Process(Protocol):
    """As much of subprocess.Popen as is used."""

    pid: int

    def wait(self) -> int: ...


# (command, environment, stdout, stderr) -> a process that leads a group of its own.
Spawn = Callable[[Sequence[str], Mapping[str, str], int, int], Process]


@dataclass
class Rank:
    """One process. `log_start`: where this start's lines begin in its log; `ended`: (monotonic time, exit code)."""

    rank: int
    process: Process
    log: Path
    log_start: int
    report: Path
    beat: Reader
    ended: tuple[float, int] | None = None
    was_told_to_end: bool = False

    def failure(self) -> Failure | None:
        """The error that it left."""
        return recorded(self.report)

    def tail(self) -> str:
        """The last lines that it wrote in this start."""
        with open(self.log, "rb") as log:
            log.seek(max(self.log_start, log.seek(0, os.SEEK_END) - 4 * MAX_TEXT))
            lines = log.read().decode("utf-8", "replace").splitlines()
        return "\n".join([line for line in lines if line.strip()][-_TAIL_LINES:])


@dataclass
class Ranks:
    """The ranks `first` .. `first + count` of `world_size`. `variables`: environment of all; `logs`: folder of this
    start; `scratch`: an empty folder of this node for reports and heartbeats; `shows_first`: the job's rank 0 also
    writes to this process's stdout and stderr."""

    command: Sequence[str]
    variables: Mapping[str, str]
    logs: Path
    scratch: Path
    shows_first: bool = True
    spawn: Spawn | None = None
    all: list[Rank] = field(default_factory=list)
    tee: Tee | None = None
    _kill_at: float | None = None

    def start(self, first: int, count: int, world_size: int, address: str, port: int) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        for local in range(count):
            self._start_one(
                first + local,
                {
                    **self.variables,
                    "RANK": str(first + local),
                    "LOCAL_RANK": str(local),
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_WORLD_SIZE": str(count),
                    "MASTER_ADDR": address,
                    "MASTER_PORT": str(port),
                },
            )

    def _start_one(self, rank: int, variables: dict[str, str]) -> None:
        report = self.scratch / f"rank-{rank:05d}.json"
        beat = Reader(self.scratch / f"rank-{rank:05d}.beat")
        variables |= {FAILURE_FILE: str(report), HEARTBEAT_FILE: str(beat.path)}
        log = self.logs / f"rank-{rank:05d}.log"
        start = log.stat().st_size if log.exists() else 0
        if rank == 0 and self.shows_first:
            self.tee = Tee(log)
            ends, started = self.tee.ends, self.tee.started
        else:
            variables.setdefault("PYTHONUNBUFFERED", "1")  # what it said before it was killed is in its log
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            ends, started = (file, file), lambda: os.close(file)
        try:
            with _signals_wait():
                process = (self.spawn or _popen)(self.command, variables, *ends)
        finally:
            started()
        self.all.append(Rank(rank, process, log, start, report, beat))

    @property
    def running(self) -> list[Rank]:
        return [one for one in self.all if one.ended is None]

    @property
    def wakes_at(self) -> float | None:
        """When `kill_if_due` has something to do, on the monotonic clock."""
        return self._kill_at if self.running else None

    def forward(self, number: int) -> None:
        for one in self.running:
            os.kill(one.process.pid, number)

    def end(self, grace: float, *, asks: bool = True) -> None:
        """SIGTERM now (where `asks`), SIGKILL after `grace` seconds to what is left; a second call only shortens the
        time."""
        if self._kill_at is None:
            for one in self.running:
                one.was_told_to_end = True
                if asks:
                    os.kill(one.process.pid, signal.SIGTERM)
        due = time.monotonic() + grace
        self._kill_at = due if self._kill_at is None else min(due, self._kill_at)
        self.kill_if_due()

    def kill_if_due(self) -> None:
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            for one in self.running:
                one.was_told_to_end = True
                _signal_group(one.process.pid, signal.SIGKILL)

    def kill_all(self) -> None:
        """End what still runs, with all that it started, and wait for it."""
        for one in self.running:
            one.was_told_to_end = True
            _signal_group(one.process.pid, signal.SIGKILL)
        for one in self.running:
            one.ended = time.monotonic(), codes.of_status(one.process.wait())

    def reap(self) -> list[Rank]:
        """Ranks that have ended since the last call."""
        found = []
        for one in self.running:
            pid = one.process.pid
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            # Before its number is free again: end the processes that it left behind.
            _signal_group(pid, signal.SIGKILL)
            one.ended = time.monotonic(), codes.of_status(one.process.wait())
            found.append(one)
        return found

    def close(self) -> None:
        self.kill_all()
        if self.tee is not None:
            self.tee.close()


def _popen(command: Sequence[str], variables: Mapping[str, str], stdout: int, stderr: int) -> Process:
    return subprocess.Popen(
        command,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        process_group=0,
        preexec_fn=in_child(os.getpid()),
    )


def in_child(parent: int) -> Callable[[], None]:
    """What each rank does before its program starts."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)
        # A signal that came since the fork meets the default action, not the agent's handler.
        for number in FORWARDED:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)

    return prepare


@contextmanager
def _signals_wait() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        return  # nobody is left in it
