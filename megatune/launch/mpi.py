"""One rank of a run that mpirun started: MPI says who is where, and ends all ranks when one fails. Imports no torch.

MPI stays out of the process that trains (it may not fork, holds threads and memory hooks, and would wait in
MPI_Finalize for a peer that is dead). The process that mpirun started is a watcher: it asks MPI (mpi4py) for ranks and
for an address that all reach, starts the worker with torchrun's variables, and waits for it. The watchers tell rank 0's
how their workers ended; it prints one report, the first failure's, and calls MPI_Abort, so that no rank waits on.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from megatune.errors import MegatuneError, ParallelError
from megatune.launch import codes
from megatune.launch.environment import (
    interface_of,
    local_addresses,
    reserved_port,
    started_by_mpirun,
    usable_cores,
)
from megatune.launch.report import FAILURE_FILE, recorded

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# The worker is no MPI process: nothing in it may try to be one.
_MPI_VARIABLES = ("PMI_", "PMIX_", "PMI2_", "OMPI_", "PRTE_", "MPI_LOCAL", "HYDI_", "HYDRA_")
_POLL = 0.05
_MORE = 0.5  # seconds after the first failure in which others may say that theirs came before
_ENDED, _GO = 1, 2  # tags of messages between watchers
_PR_SET_PDEATHSIG = 1
_CONNECT = 3.0  # seconds to try one address of rank 0's machine


@dataclass(frozen=True)
class Ended:
    """How a rank's worker ended: `time` of its error (seconds since the epoch), `text` of its report, `log` it wrote
    to; empty where there is none."""

    rank: int
    code: int
    host: str
    time: float
    text: str
    log: str


def usable(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether mpirun started this process and mpi4py, with a library of the same MPI, is there to ask.

    MPI_Init of one MPI under another's mpirun ends the process or makes each rank a world of its own, so the library's
    name is looked at first.
    """
    family = started_by_mpirun(environ)
    if not family or find_spec("mpi4py") is None:
        return False
    try:
        library = _mpi().Get_library_version()
    except (ImportError, RuntimeError):  # no MPI library that it could load
        return False
    return ("Open MPI" in library) == (family == "openmpi")


def run(
    argv: Sequence[str],
    prepare: Callable[[int], str | None],
    *,
    command: Sequence[str] | None = None,
) -> int:
    """Be the rank that mpirun meant this process to be: run `python -m megatune *argv` until it has ended.

    `prepare`: called on rank 0 with the number of ranks before any worker starts; returns the folder for logs, None
    where nothing is left to do. What it raises ends the run on all ranks, said once. Rank 0 writes to mpirun's output,
    the others to `rank-00001.out` and so on in the folder (an empty name: to mpirun's output, too). `command`: instead
    of `python -m megatune`.

    Returns the exit code where all ranks ended well (0), stopped on request (75), or none was started (0, 2). After a
    failure of any rank MPI_Abort ends this process, with the code of the rank that failed first.
    """
    with _signals_held():  # before MPI starts threads, which take over what is blocked now
        MPI = _mpi()
        MPI.Init()
        comm = MPI.COMM_WORLD
        with reserved_port() as port:
            code, logs = _agree(comm, prepare)
            if code is None:
                found = variables(comm, MPI, port)
                worker = Worker.start([*(command or (sys.executable, "-m", "megatune")), *argv], found, logs)
                code = _watch(comm, worker)
        MPI.Finalize()
    return code


def _mpi() -> Any:
    """mpi4py's MPI, not initialised, and not to be finalised by Python's exit, where it could wait for ever."""
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    from mpi4py import MPI

    return MPI


def _agree(comm: Any, prepare: Callable[[int], str | None]) -> tuple[int | None, str]:
    """(exit code where rank 0 finds nothing to start, None to go on; folder for logs)."""
    code, logs = None, None
    if comm.rank == 0:
        try:
            logs = prepare(comm.size)
            code = 0 if logs is None else None
        except MegatuneError as error:
            print(f"megatune: {error}", file=sys.stderr, flush=True)
            code = codes.USER_ERROR
    return comm.bcast((code, logs or ""))


def variables(comm: Any, MPI: Any, port: int) -> dict[str, str]:
    """torchrun's variables for this rank, from MPI alone: no shared file, nothing passed through mpirun.

    `port`: a free port of this machine; rank 0's is taken. MASTER_ADDR and MASTER_PORT win where they are set.
    """
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)
    found = {
        "RANK": str(comm.rank),
        "WORLD_SIZE": str(comm.size),
        "LOCAL_RANK": str(node.rank),
        "LOCAL_WORLD_SIZE": str(node.size),
        "MASTER_PORT": str(comm.bcast(os.environ.get("MASTER_PORT", port))),
    }
    given = comm.bcast(os.environ.get("MASTER_ADDR"))
    alone = comm.allreduce(int(node.size == comm.size)) == comm.size
    node.Free()
    if given or alone:
        return found | {"MASTER_ADDR": given or "127.0.0.1"}
    address = common_address(comm)
    found["MASTER_ADDR"] = address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:  # sends nothing: asks for the way there
        route.connect((address, 1))
        interface = interface_of(route.getsockname()[0])
    if interface and not interface.startswith("lo"):
        # Else gloo takes what the host's own name resolves to, which on many machines is the loopback.
        found["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", interface)
    return found


def common_address(comm: Any, timeout: float = _CONNECT) -> str:
    """The first address of rank 0's machine that every rank reaches. No name has to be resolved.

    Raises ParallelError on all ranks where there is none.
    """
    token = comm.bcast(secrets.token_bytes(16))
    addresses = comm.bcast(local_addresses())
    with _answering(token) if comm.rank == 0 else _nobody() as port:
        port = comm.bcast(port)
        mine = [comm.rank == 0 or _answers(address, port, token, timeout) for address in addresses]
        everyone = comm.allgather((socket.gethostname(), mine))
    for number, address in enumerate(addresses):
        if all(reached[number] for _, reached in everyone):
            return address
    lost = sorted({host for host, reached in everyone if not any(reached)})
    raise ParallelError(
        f"no address of rank 0's machine ({', '.join(addresses) or 'it has none'}) is reached by all ranks"
        f"{'; ' + ', '.join(lost) + ' reach none' if lost else ''}: open the network between the machines, or set "
        f"MASTER_ADDR to an address that they all reach"
    )


@contextmanager
def _answering(token: bytes) -> Iterator[int]:
    """A port that says `token` to whoever connects, so that nobody takes another machine for this one."""
    with socket.create_server(("", 0), backlog=1024) as server:

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(token)
                except OSError:
                    if server.fileno() < 0 or stop.is_set():
                        return

        stop = threading.Event()
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            stop.set()
            server.shutdown(socket.SHUT_RDWR)  # wakes accept
            thread.join()


@contextmanager
def _nobody() -> Iterator[None]:
    yield None


def _answers(address: str, port: int, token: bytes, timeout: float) -> bool:
    try:
        with socket.create_connection((address, port), timeout) as connection:
            return connection.recv(len(token), socket.MSG_WAITALL) == token
    except OSError:
        return False


@dataclass
class Worker:
    """The process that trains, as the rank of its watcher."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path | None
    reports: tempfile.TemporaryDirectory[str]

    @classmethod
    def start(cls, command: Sequence[str], found: Mapping[str, str], logs: str) -> Worker:
        rank = int(found["RANK"])
        reports = tempfile.TemporaryDirectory(prefix="megatune-")
        own = {name: value for name, value in os.environ.items() if not name.startswith(_MPI_VARIABLES)}
        own |= found | {FAILURE_FILE: f"{reports.name}/failure.json"}
        own.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // int(found["LOCAL_WORLD_SIZE"]))))
        own.setdefault("PYTHONFAULTHANDLER", "1")
        log = None
        if rank and logs:
            log = Path(logs) / f"rank-{rank:05d}.out"
            log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") if log else nullcontext() as output:
            process = subprocess.Popen(
                command,
                env=own,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
                preexec_fn=_in_child(os.getpid()),
            )
        return cls(rank, process, log, reports)

    def ended(self) -> Ended | None:
        """How it ended; None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        code = codes.of_status(code)
        failure = recorded(Path(self.reports.name) / "failure.json")
        host = socket.gethostname()
        if failure is not None:
            return Ended(self.rank, code, host, failure.time, failure.text, str(self.log or ""))
        # Peers fail, too, when one is killed, within milliseconds; it had no time for a report.
        killed = code in codes.KILLED
        return Ended(self.rank, code, host, time.time() - 0.5 * killed, "", str(self.log or ""))

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.reports.cleanup()


def _watch(comm: Any, worker: Worker) -> int:
    """Wait for this rank's worker and the others; does not return when one of them failed."""
    mine: Ended | None = None
    others: list[Ended] = []
    fail_at = None
    try:
        while True:
            received = signal.sigtimedwait((*_FORWARDED, signal.SIGCHLD), _POLL)
            if received is not None and received.si_signo in _FORWARDED and mine is None:
                os.kill(worker.process.pid, received.si_signo)
            if mine is None and (mine := worker.ended()) is not None and comm.rank:
                comm.send(mine, dest=0, tag=_ENDED)
            if comm.rank:
                if comm.iprobe(source=0, tag=_GO):
                    return comm.recv(source=0, tag=_GO)
                continue
            while comm.iprobe(tag=_ENDED):
                others.append(comm.recv(tag=_ENDED))
            ended = [*others, *([mine] if mine else [])]
            if fail_at is None and any(one.code not in codes.CLEAN for one in ended):
                fail_at = time.monotonic() + _MORE
            if fail_at is not None and (time.monotonic() >= fail_at or len(ended) == comm.size):
                _fail(comm, ended)
            if len(ended) == comm.size:
                code = max(one.code for one in ended)
                for rank in range(1, comm.size):
                    comm.send(code, dest=rank, tag=_GO)
                return code
    finally:
        worker.end()


def _fail(comm: Any, ended: Sequence[Ended]) -> NoReturn:
    """Say what failed first, and end all ranks."""
    failed = [one for one in ended if one.code not in codes.CLEAN]
    first = min(failed, key=lambda one: (one.time, one.rank))
    if first.code == codes.USER_ERROR and first.text:
        print(f"megatune: {first.text}", file=sys.stderr)
    else:
        others = f"; the other {comm.size - 1} are ended" if comm.size > 1 else ""
        where = f"rank {first.rank} of {comm.size} on {first.host}"
        print(f"megatune: {where} {codes.how(first.code)}{others}", file=sys.stderr)
        for line in first.text.rstrip().splitlines():
            print(f"  {line}", file=sys.stderr)
        if first.log:
            print(f"  output of rank {first.rank}: {first.log}", file=sys.stderr)
    sys.stderr.flush()
    comm.Abort(first.code)
    raise AssertionError("MPI_Abort returned")


def _in_child(parent: int) -> Callable[[], None]:
    """What the worker does before its program starts: it dies with its watcher, and hears signals again."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*_FORWARDED, signal.SIGCHLD))

    return prepare


@contextmanager
def _signals_held() -> Iterator[None]:
    """Signals wait until `sigtimedwait` asks for them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*_FORWARDED, signal.SIGCHLD))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
