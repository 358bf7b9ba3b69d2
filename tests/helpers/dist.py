"""Run a function on several ranks: processes with a process group, as torchrun would start them.

The processes are forked from a server that has torch and megatune imported already: a group of two is up in 0.1 s.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# What nearly every rank imports. (That megatune can be imported in any order, and is light to import, is tested in
# processes of their own: tests/unit/test_architecture.py.)
PRELOAD = [
    "pytest",
    "numpy",
    "pydantic",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "torch._dynamo",  # which fully_shard loads when it first runs
    "matplotlib.backends.backend_agg",  # with which the first rank of a run draws its losses
    "megatune.training.run",
]
BACKENDS = {"gloo": "gloo", "nccl": "cpu:gloo,cuda:nccl"}


class RankError(AssertionError):
    """One or more ranks failed; the message holds their tracebacks, the first failure on top."""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    backend: str = "gloo",
    init: bool = True,
) -> list[Any]:
    """Call fn(rank, world_size, *args) in `world_size` processes; returns what they return, by rank.

    `fn`: importable (module level). Arguments and results are pickled by value, tensors included.
    `init`: start the default process group before the call; else only torchrun's environment variables are set.
    `backend`: "gloo", or "nccl" (one GPU a rank; host tensors still go over gloo).
    Raises RankError with the traceback of the rank that failed first, or after `timeout` seconds with the stack
    of every rank that still runs. No process outlives the call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # The ranks meet at a store of this process: its port is taken before any of them starts.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    payload = pickle.dumps((fn, args))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks: list[_Rank] = []
        try:
            for rank in range(world_size):
                env = _environment(rank, world_size, store.port)
                ranks.append(_Rank(context, rank, (env, payload, backend, init, timeout, folder)))
            return _collect(ranks, time.monotonic() + timeout, timeout)
        finally:
            for rank in ranks:
                rank.end()


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # As under torchrun: the store is there already, rank 0 does not open one.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }


class _Rank:
    """One rank's process and the pipe on which it reports."""

    def __init__(self, context: Any, rank: int, args: tuple[Any, ...]) -> None:
        self.number = rank
        self.folder = Path(args[-1])
        self.pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_main, args=(theirs, *args), name=f"rank{rank}")
        self.process.start()
        theirs.close()

    def report(self) -> tuple[bool, Any]:
        """(True, result) or (False, text of the failure); blocks until the process reports or dies."""
        try:
            return pickle.loads(self.pipe.recv_bytes())
        except EOFError:
            self.process.join()
            return False, f"the process died with exit code {self.process.exitcode}"

    def stack(self) -> str:
        """Where the process stands now."""
        path = self.folder / f"stack-{self.number}"
        if self.process.is_alive() and path.exists():
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.2)
            return path.read_text()
        return "(no stack)\n"

    def end(self) -> None:
        self.process.join(0.5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()
        self.pipe.close()


def _collect(ranks: Sequence[_Rank], deadline: float, timeout: float) -> list[Any]:
    waiting = {rank.pipe: rank for rank in ranks}
    results: dict[int, Any] = {}
    failures: list[str] = []
    while waiting:
        # After a failure the others get a moment to report theirs; most of them only wait for the dead one.
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            rank = waiting.pop(pipe)
            good, value = rank.report()
            if good:
                results[rank.number] = value
            else:
                failures.append(f"rank {rank.number} of {len(ranks)} failed:\n{value}")
                deadline = min(deadline, time.monotonic() + 1.0)
    if failures:
        raise RankError("\n\n".join(failures))
    if waiting:
        stacks = "\n".join(f"rank {rank.number} stands at:\n{rank.stack()}" for rank in waiting.values())
        raise RankError(f"{len(waiting)} of {len(ranks)} ranks did not return within {timeout:g} s\n{stacks}")
    return [results[number] for number in range(len(ranks))]


def _main(
    pipe: Connection,
    env: dict[str, str],
    payload: bytes,
    backend: str,
    init: bool,
    timeout: float,
    folder: str,
) -> None:
    gc.freeze()  # what the server has imported is never looked through again: a seventh of a small run's time
    os.environ.update(env)
    rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
    with open(Path(folder) / f"stack-{rank}", "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
        try:
            report = (True, _call(rank, world_size, payload, backend, init, timeout))
            message = pickle.dumps(report)
        except BaseException:  # a test's failure, an exit or an interrupt: all of them are the rank's report
            message = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(message)
        pipe.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        faulthandler.unregister(signal.SIGUSR1)


def _call(rank: int, world_size: int, payload: bytes, backend: str, init: bool, timeout: float) -> Any:
    torch.set_num_threads(1)
    # A forked process starts with the server's generator state; the same seed everywhere would hide mistakes.
    random.seed(rank)
    torch.manual_seed(rank)
    fn, args = pickle.loads(payload)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    if init:
        dist.init_process_group(BACKENDS[backend], timeout=timedelta(seconds=timeout))
    return fn(rank, world_size, *args)
