"""Start the processes of a run on this machine, and end them together. Imports no torch: the parent costs nothing.

Each worker is `python -m megatune ARGUMENTS` with torchrun's environment variables, in a process group of its own (so
that Ctrl-C reaches the launcher alone, which forwards it once), and is killed by the kernel should the launcher die.
Rank 0 has the terminal; the others write to `rank-00001.out` and so on.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from megatune.errors import ParallelError
from megatune.launch.environment import already_launched, gpu_count, rank_variables, usable_cores
from megatune.launch.report import FAILURE_FILE, Failure, recorded

__all__ = ["already_launched", "gpu_count", "rank_variables", "run_local", "usable_cores"]

USER_ERROR = 2
STOPPED = 75  # stopped on request, with a checkpoint: not a failure, the others may finish theirs
_CLEAN = (0, STOPPED)
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_WATCHED = (*_FORWARDED, signal.SIGCHLD)
_TAIL_LINES = 20
_PR_SET_PDEATHSIG = 1


def run_local(
    argv: Sequence[str],
    nproc: int,
    *,
    env: Mapping[str, str] | None = None,
    log_folder: str | os.PathLike[str] | None = None,
    command: Sequence[str] | None = None,
    grace: float = 8.0,
) -> int:
    """Run `python -m megatune *argv` in `nproc` processes until all have ended; returns the exit code.

    0 where all ended well, 75 where they stopped on request, else the code of the rank that failed first (128 + signal
    where it was killed); its error, and only its, is printed to stderr. A failed rank ends the others: SIGTERM, after
    `grace` seconds SIGKILL. SIGINT, SIGTERM and SIGUSR1 are forwarded once each; a second SIGINT is forwarded and
    starts the grace time, a third kills at once.

    `env`: added to this process's environment. `log_folder`: for ranks' output (default: a temporary folder, which
    stays only after a failure). `command`: instead of `python -m megatune`. Call it from the main thread.
    """
    if nproc < 1:
        raise ParallelError(f"launch.nproc: {nproc} processes cannot be started; use 1 or more")
    own_folder = log_folder is None
    logs = Path(tempfile.mkdtemp(prefix="megatune-logs-") if own_folder else log_folder)
    logs.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="megatune-") as reports,
        _reserved_port() as port,
        _signals_held(),
    ):
        variables = {**os.environ, **(env or {})}
        variables |= {
            "WORLD_SIZE": str(nproc),
            "LOCAL_WORLD_SIZE": str(nproc),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        # torch's default is all cores for each process, which is slower than one thread when they fight.
        variables.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // nproc)))
        variables.setdefault("PYTHONFAULTHANDLER", "1")
        workers = Workers(
            [*(command or (sys.executable, "-m", "megatune")), *argv], logs, Path(reports), grace
        )
        try:
            for rank in range(nproc):
                workers.start(rank, variables)
            code = workers.watch()
        finally:
            workers.kill()
            if sys.stdout.isatty():
                print("\x1b[?25h", end="", flush=True)  # rank 0's progress line may have hidden the cursor
    if own_folder and code in _CLEAN:
        shutil.rmtree(logs)
    return code


@dataclass
class Worker:
    """One process. `log_start`: where this run's lines begin in its log; `ended`: (time, exit code) once it has."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path | None
    log_start: int
    report: Path
    ended: tuple[float, int] | None = None
    was_told_to_end: bool = False


@dataclass
class Workers:
    """The processes of one run and what is known about how they ended."""

    command: Sequence[str]
    logs: Path
    reports: Path
    grace: float
    all: list[Worker] = field(default_factory=list)
    _received: set[int] = field(default_factory=set)
    _kill_at: float | None = None

    def start(self, rank: int, variables: Mapping[str, str]) -> None:
        report = self.reports / f"rank-{rank:05d}.json"
        own = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank), FAILURE_FILE: str(report)}
        log: Path | None = None
        output: IO[bytes] | None = None
        start = 0
        if rank:
            own.setdefault("PYTHONUNBUFFERED", "1")  # what it said before it was killed is in its log
            log = self.logs / f"rank-{rank:05d}.out"
            output = open(log, "ab")  # noqa: SIM115  (closed below, the worker has its own)
            start = output.tell()
        try:
            process = subprocess.Popen(
                self.command,
                env=own,
                stdin=subprocess.DEVNULL if rank else None,
                stdout=output,
                stderr=output,
                process_group=0,
                preexec_fn=_in_child(os.getpid()),
            )
        finally:
            if output is not None:
                output.close()
        self.all.append(Worker(rank, process, log, start, report))

    def watch(self) -> int:
        """Wait for all, forwarding signals; returns the exit code and prints the first failure."""
        while self._running():
            number = self._next_signal()
            if number in _FORWARDED:
                self._forward(signal.Signals(number))
            self._reap()
            if self._kill_at is None and any(code not in _CLEAN for _, code in self._ended()):
                self._end_all()
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                self.kill()
        return self._verdict()

    def kill(self) -> None:
        """End what still runs, with all that it started."""
        for worker in self._running():
            worker.was_told_to_end = True
            _signal_group(worker.process.pid, signal.SIGKILL)
        for worker in self._running():
            worker.process.wait()
            worker.ended = (time.time(), _exit_code(worker.process.returncode))

    def _running(self) -> list[Worker]:
        return [worker for worker in self.all if worker.ended is None]

    def _ended(self) -> Iterator[tuple[float, int]]:
        return (worker.ended for worker in self.all if worker.ended is not None)

    def _next_signal(self) -> int | None:
        limit = 1.0 if self._kill_at is None else max(0.0, min(1.0, self._kill_at - time.monotonic()))
        received = signal.sigtimedwait(_WATCHED, limit)
        return received.si_signo if received else None

    def _forward(self, number: signal.Signals) -> None:
        again = number in self._received
        self._received.add(number)
        if again and number != signal.SIGINT:
            return
        if again and self._kill_at is not None:
            self._kill_at = time.monotonic()
            return
        if again:
            self._kill_at = time.monotonic() + self.grace
        for worker in self._running():
            os.kill(worker.process.pid, number)

    def _end_all(self) -> None:
        self._kill_at = time.monotonic() + self.grace
        for worker in self._running():
            worker.was_told_to_end = True
            os.kill(worker.process.pid, signal.SIGTERM)

    def _reap(self) -> None:
        for worker in self._running():
            pid = worker.process.pid
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            # Before its number is free again: end the processes that it left behind.
            _signal_group(pid, signal.SIGKILL)
            worker.process.wait()
            worker.ended = (time.time(), _exit_code(worker.process.returncode))

    def _verdict(self) -> int:
        codes = [code for _, code in self._ended()]
        if all(code in _CLEAN for code in codes):
            return max(codes)
        worker, failure = self._first_failure()
        if worker is None:  # killed after a second Ctrl-C
            return 128 + signal.SIGINT
        code = worker.ended[1]
        if failure is not None and worker.was_told_to_end:
            # It had left its report and was on its way out when the launcher ended it for a peer's failure.
            code = USER_ERROR if failure.is_user_error else 1
        if code == USER_ERROR:
            self._print_user_error(worker, failure)
        elif code - 128 not in self._received:  # else it did as it was asked to
            self._print_failure(worker, failure, code)
        return code

    def _first_failure(self) -> tuple[Worker | None, Failure | None]:
        """The rank whose error came first. Peers fail, too, when one dies: within milliseconds, so its report's time
        counts rather than its end, and a process that a signal killed had no time for a report."""
        found: list[tuple[float, Worker, Failure | None]] = []
        for worker in self.all:
            ended, code = worker.ended
            failure = recorded(worker.report)
            if failure is not None and code not in _CLEAN:
                found.append((failure.time, worker, failure))
            elif code not in _CLEAN and not worker.was_told_to_end:
                killed = code in (128 + signal.SIGKILL, 128 + signal.SIGSEGV, 128 + signal.SIGBUS)
                found.append((ended - 0.5 * killed, worker, None))
        if not found:
            return None, None
        _, worker, failure = min(found, key=lambda item: (item[0], item[1].rank))
        return worker, failure

    def _print_user_error(self, worker: Worker, failure: Failure | None) -> None:
        if failure is not None:
            print(f"megatune: {failure.text}", file=sys.stderr)
        elif self.all[0].ended[1] != USER_ERROR:  # else rank 0 has said it on the terminal
            print("\n".join(_tail(worker)[-1:]), file=sys.stderr)

    def _print_failure(self, worker: Worker, failure: Failure | None, code: int) -> None:
        how = (
            f"was killed by {signal.Signals(code - 128).name}"
            if code > 128
            else f"failed with exit code {code}"
        )
        if code == 128 + signal.SIGKILL:
            how += " (by the kernel if memory ran out: see dmesg)"
        others = f"; the other {len(self.all) - 1} were ended" if len(self.all) > 1 else ""
        print(f"megatune: rank {worker.rank} of {len(self.all)} {how}{others}", file=sys.stderr)
        for line in failure.text.rstrip().splitlines() if failure is not None else _tail(worker):
            print(f"  {line}", file=sys.stderr)
        if worker.log is not None:
            print(f"  output of rank {worker.rank}: {worker.log}", file=sys.stderr)


def _tail(worker: Worker) -> list[str]:
    """The last lines that the worker wrote in this run (rank 0's are on the terminal already)."""
    if worker.log is None:
        return []
    with open(worker.log, "rb") as log:
        log.seek(max(worker.log_start, log.seek(0, os.SEEK_END) - 64 * 1024))
        lines = log.read().decode("utf-8", "replace").splitlines()
    return [line for line in lines if line.strip()][-_TAIL_LINES:]


def _exit_code(returncode: int) -> int:
    return returncode if returncode >= 0 else 128 - returncode


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        return  # nobody is left in it


def _in_child(parent: int):
    """What each worker does before its program starts."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)

    return prepare


@contextmanager
def _signals_held() -> Iterator[None]:
    """Signals wait until `sigtimedwait` asks for them: no handler, so none can come at the wrong moment."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _reserved_port() -> Iterator[int]:
    """A port for rank 0's store that nobody else can get meanwhile.

    A socket that is bound with SO_REUSEADDR but does not listen keeps the kernel from handing the port out, and still
    lets rank 0 (whose store sets SO_REUSEADDR, too) listen on it. Bound like the store's own: on all addresses.
    """
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        holder.bind(("", 0))
        yield holder.getsockname()[1]
