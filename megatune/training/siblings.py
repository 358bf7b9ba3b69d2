"""Under torchrun: a rank whose neighbour on this machine dies ends itself.

torchrun asks the others to end, but a rank that waits for the dead one in a collective cannot hear it, and is only
killed after 30 s. Under an agent of ours nothing of this is needed.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from megatune.parallel import World
from megatune.training.heartbeat import HEARTBEAT_FILE

GRACE = 5.0  # seconds for a save under way, and for an error that came with the death to be reported


@contextmanager
def neighbours_watched(world: World) -> Iterator[None]:
    """While active, the death of another rank of this machine ends this process after `GRACE` seconds."""
    if world.world_size == 1 or "TORCHELASTIC_RUN_ID" not in os.environ or HEARTBEAT_FILE in os.environ:
        yield
        return
    everyone: list[tuple[str, int]] = [("", 0)] * world.world_size
    dist.all_gather_object(everyone, (_machine(), os.getpid()))
    done_read, done_write = os.pipe()
    watched: dict[int, int] = {}
    for rank, (machine, pid) in enumerate(everyone):
        if machine == _machine() and rank != world.rank:
            with suppress(OSError):  # it cannot be seen, or died this moment: torchrun's 30 s stay
                watched[os.pidfd_open(pid)] = rank
    thread = threading.Thread(target=_watch, args=(watched, done_read), name="neighbours", daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.close(done_write)
        thread.join()
        for descriptor in (done_read, *watched):
            os.close(descriptor)


def _machine() -> str:
    """This host and its process numbers: containers on one host may have their own."""
    return f"{socket.gethostname()} {os.stat('/proc/self/ns/pid').st_ino}"


def _watch(watched: dict[int, int], done: int) -> None:
    poll = select.poll()
    for descriptor in (done, *watched):
        poll.register(descriptor, select.POLLIN | select.POLLHUP)
    found = [descriptor for descriptor, _ in poll.poll()]
    if done in found:
        return
    over = select.poll()
    over.register(done, select.POLLHUP)
    if over.poll(GRACE * 1000):
        return  # this rank has ended, well or with an error of its own
    stamp = time.strftime("%H:%M:%S")
    print(
        f"megatune: {stamp} rank {watched[found[0]]} is gone; this rank ends, too, to be started again",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
