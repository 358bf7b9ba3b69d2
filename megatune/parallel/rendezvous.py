"""Where the processes meet under torchrun: a store to which no earlier start of the job has written.

torchrun (torch >= 2.11) keeps one store over all restarts of its workers, and gloo and NCCL leave their addresses in
it under names that do not change: a worker that is up before the others reads the addresses of the dead ones and waits
for them. So rank 0 opens a new store at each start, and torchrun's only says where it is.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from megatune.errors import ParallelError

_PORT, _SIZE, _JOINED, _COMPLETE = (f"megatune/{name}" for name in ("port", "size", "joined", "complete"))
_PAUSE = 0.2  # seconds between two looks at where rank 0 is


def store_outlives_restarts() -> bool:
    """Whether MASTER_ADDR and MASTER_PORT name a store of torchrun, not one that rank 0 is to open."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def fresh_store(rank: int, world_size: int, timeout: float) -> dist.Store:
    """A store that the `world_size` processes of this start have, and no others; all of them must call.

    Raises ParallelError when they have not met after `timeout` seconds.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + timeout
    known = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout))
    if rank == 0:
        store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
        store.set(_SIZE, str(world_size))
        known.set(_PORT, str(store.port))
        if _joined(store, world_size, deadline):
            return store
    while rank and time.monotonic() < deadline:
        # What is found may be of an earlier start: its rank 0 is gone, or soon will be, or it has all its ranks.
        with suppress(dist.DistError, OSError):
            found = int(known.get(_PORT))
            socket.create_connection((address, found), timeout=5.0).close()
            store = dist.TCPStore(address, found, is_master=False, timeout=timedelta(seconds=5))
            if _joined(store, world_size, deadline):
                return store
        time.sleep(_PAUSE)
    raise ParallelError(
        f"rank {rank}: the {world_size} processes of this run did not all meet within {timeout:g} s "
        f"(launch.timeout): look at the output of the others for the reason"
    )


def _joined(store: dist.TCPStore, world_size: int, deadline: float) -> bool:
    """Whether this process is one of the `world_size` that `store` waits for, and all of them came in time."""
    if int(store.get(_SIZE)) != world_size:
        return False
    number = store.add(_JOINED, 1)
    if number > world_size:
        return False
    if number == world_size:
        store.set(_COMPLETE, "1")
    store.set_timeout(timedelta(seconds=max(0.01, deadline - time.monotonic())))
    with suppress(dist.DistStoreError):
        store.wait([_COMPLETE])
        return True
    return False
