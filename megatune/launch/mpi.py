"""A run that mpirun started: MPI says who is where, then gets out of the way. Imports no torch.

mpirun's processes ask MPI (mpi4py) which of them share a machine and under which address all reach the first one; no
file is shared for that, and no variable has to be passed. Then they end MPI, all of them, before anything can fail: MPI
in a process that trains may not fork, holds threads and memory hooks, and waits in MPI_Finalize for a peer that is
dead. The first process of each machine becomes its agent (launch/agent.py), which starts and watches as many ranks as
there were processes on it; the others end. So a run under mpirun has the reports, logs, restarts and exit codes of any
other; should an agent be killed, mpirun and the other agents end what is left.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from megatune.errors import MegatuneError, ParallelError
from megatune.launch import codes
from megatune.launch.agent import Job, run_job
from megatune.launch.environment import local_addresses, started_by_mpirun
from megatune.launch.network import reserved_port

# Ranks are no MPI processes: nothing in them may try to be one.
_MPI_VARIABLES = ("PMI_", "PMIX_", "PMI2_", "OMPI_", "PRTE_", "MPI_LOCAL", "HYDI_", "HYDRA_")
_GPUS = "CUDA_VISIBLE_DEVICES"
_CONNECT = 3.0  # seconds to try one address of the first machine


def usable(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether mpirun started this process and mpi4py, with a library of the same MPI, is there to ask.

    MPI_Init of one MPI under another's mpirun ends the process, or makes each rank a world of its own, so the library's
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


def run(prepare: Callable[[int], Job | None]) -> int:
    """Be what this process of mpirun's has to be, until the run is over; returns its exit code.

    `prepare`: called on rank 0 with the number of ranks before any starts; the job, as far as it is the same on all
    machines, or None where nothing is left to do. What it raises ends the run on all ranks, said once.

    The run's exit code comes from the first process, which mpirun hands on; the others return it, too, unless all ended
    well (0, 75): mpirun ends the rest as soon as one process returns anything but 0.
    """
    MPI = _mpi()
    MPI.Init()
    comm = MPI.COMM_WORLD
    with reserved_port() as port:
        code, job = _agree(comm, prepare)
        mine = None if job is None else _part(comm, MPI, job, port)
        first = comm.rank == 0
        MPI.Finalize()
        if mine is None:
            return code if first else 0
        for name in [name for name in os.environ if name.startswith(_MPI_VARIABLES)]:
            del os.environ[name]
        code = run_job(mine)
    return code if first or code not in codes.CLEAN else 0


def _mpi() -> Any:
    """mpi4py's MPI, not initialised, and not finalised when Python exits."""
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    from mpi4py import MPI

    return MPI


def _agree(comm: Any, prepare: Callable[[int], Job | None]) -> tuple[int, Job | None]:
    """Rank 0's (exit code, job) on all ranks."""
    code, job = 0, None
    if comm.rank == 0:
        try:
            job = prepare(comm.size)
        except MegatuneError as error:
            print(f"megatune: {error}", file=sys.stderr, flush=True)
            code = codes.USER_ERROR
    return comm.bcast((code, job))


def _part(comm: Any, MPI: Any, job: Job, port: int) -> Job | None:
    """This machine's part of the job on its first process, None on the others. `port`: free on this machine.

    MASTER_ADDR and MASTER_PORT, where set, say where the first machine's agent listens.
    """
    here = comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)
    nproc, is_agent = here.size, here.rank == 0
    cores = here.allgather(sorted(os.sched_getaffinity(0)))
    gpus = here.allgather(os.environ.get(_GPUS, ""))
    here.Free()
    agents = comm.Split(0 if is_agent else MPI.UNDEFINED, key=comm.rank)
    if not is_agent:
        return None
    # mpirun ties a process to its own cores, and some sites to its own GPU; the agent's ranks have all of them.
    os.sched_setaffinity(0, {core for some in cores for core in some})
    if all(gpus) and len(set(gpus)) > 1:
        os.environ[_GPUS] = ",".join(dict.fromkeys(gpus))
    port = agents.bcast(int(os.environ.get("MASTER_PORT", port)))
    address = agents.bcast(os.environ.get("MASTER_ADDR"))
    if address is None:
        address = common_address(agents) if agents.size > 1 else "127.0.0.1"
    secret = agents.bcast(secrets.token_hex(16))
    return replace(
        job,
        nproc=nproc,
        nodes=agents.size,
        node=agents.rank,
        endpoint=(address, port),
        run_id="mpirun",
        secret=secret,
    )


def common_address(comm: Any, timeout: float = _CONNECT) -> str:
    """The first address of rank 0's machine that every rank reaches. No name has to be resolved.

    Raises ParallelError on all ranks where there is none.
    """
    token = comm.bcast(secrets.token_bytes(16))
    addresses = comm.bcast(local_addresses())
    with _answering(token) if comm.rank == 0 else nullcontext() as port:
        port = comm.bcast(port)
        reached = [comm.rank == 0 or _answers(address, port, token, timeout) for address in addresses]
        everyone = comm.allgather((socket.gethostname(), reached))
    for number, address in enumerate(addresses):
        if all(reached[number] for _, reached in everyone):
            return address
    lost = sorted({host for host, reached in everyone if not any(reached)})
    raise ParallelError(
        f"no address of rank 0's machine ({', '.join(addresses) or 'it has none'}) is reached by all others"
        f"{'; ' + ', '.join(lost) + ' reach none' if lost else ''}: open the network between the machines, or set "
        f"MASTER_ADDR to an address that they all reach"
    )


@contextmanager
def _answering(token: bytes) -> Iterator[int]:
    """A port that says `token` to whoever connects, so that nobody takes another machine for this one."""
    with socket.create_server(("", 0), backlog=1024) as server:
        done = threading.Event()

        def answer() -> None:
            while not done.is_set():
                try:
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(token)
                except OSError:
                    continue

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            done.set()
            server.shutdown(socket.SHUT_RDWR)  # wakes accept
            thread.join()


def _answers(address: str, port: int, token: bytes, timeout: float) -> bool:
    try:
        with socket.create_connection((address, port), timeout) as connection:
            return connection.recv(len(token), socket.MSG_WAITALL) == token
    except OSError:
        return False
