"""Processes that do a conversion's tasks, each with the checkpoint open on its own."""

from __future__ import annotations

import copy
import multiprocessing
import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

from megatune import errors
from megatune.errors import CheckpointError, MegatuneError

_TELL_SECONDS = 0.2
Task = tuple[Any, ...]


class Work(Protocol):
    """What workers do: small and picklable; it opens what it needs where it is called."""

    def do(self, task: Task, passed: Callable[[int], None]) -> Any:
        """The result of one task, JSON values; `passed` is told of bytes as they go by."""
        ...


def run(
    work: Work, tasks: Sequence[Task], workers: int, passed: Callable[[int], None]
) -> Iterator[tuple[Task, Any]]:
    """(task, its result) as they are finished, by `workers` processes; one: in this process. MegatuneErrors of workers
    are raised here. CheckpointError where one died."""
    workers = min(workers, len(tasks))
    if workers <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in workers: the same sums, whatever their number
        try:
            for task in tasks:
                yield task, work.do(task, passed)
        finally:
            torch.set_num_threads(threads)
        return
    crew = _Crew(work, workers)
    try:
        yield from crew.run(tasks, passed)
    finally:
        crew.close()


class _Crew:
    def __init__(self, work: Work, workers: int) -> None:
        context = _context()
        self._members: dict[Connection, Any] = {}
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            with warnings.catch_warnings():  # of threads of libraries: `_serve` starts none of their work
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()
            self._members[ours] = process

    def run(self, tasks: Sequence[Task], passed: Callable[[int], None]) -> Iterator[tuple[Task, Any]]:
        left, busy = list(reversed(tasks)), {}
        for connection in self._members:
            if left:
                busy[connection] = left.pop()
                connection.send(busy[connection])
        while busy:
            for connection in wait(list(busy)):
                try:
                    kind, value = connection.recv()
                except (EOFError, ConnectionError) as error:
                    raise self._died(connection) from error
                if kind == "passed":
                    passed(value)
                    continue
                if kind == "error":
                    raise _as_error(*value)
                task = busy.pop(connection)
                if left:
                    busy[connection] = left.pop()
                    connection.send(busy[connection])
                yield task, value

    def _died(self, connection: Connection) -> CheckpointError:
        process = self._members[connection]
        process.join(5)
        return CheckpointError(
            f"a process of the conversion ended (exit code {process.exitcode}); was there too little memory? Run the "
            "same command again to go on, with fewer --workers"
        )

    def close(self) -> None:
        for connection, process in self._members.items():
            connection.close()
            process.terminate()
        for process in self._members.values():
            process.join()


def _context() -> Any:
    """How processes start. A process without threads of its own is forked, in milliseconds; from any other one a server
    is started that has the imports done, and forks them."""
    if threading.active_count() == 1 and not torch.cuda.is_initialized():
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "megatune.checkpoint.convert.core"])
    return context


def _serve(connection: Connection, work: Work) -> None:
    """A worker: tasks from the pipe until it is closed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    work = copy.copy(work)  # not the parent's open files: readers of one share what Linux reads ahead for it
    meter = _Meter(connection)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            answer = ("done", work.do(task, meter.add))
        except Exception as error:
            known = (kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
            name = next(known, type(error).__name__)
            answer = ("error", (name, str(error), traceback.format_exc()))
        meter.flush()
        connection.send(answer)


def _end_with_parent() -> None:
    """Nobody writes to the destination once the process that began the conversion is gone, however it went."""
    multiprocessing.parent_process().join()
    os._exit(1)


class _Meter:
    """Tells of bytes a few times a second."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._bytes, self._told = connection, 0, time.monotonic()

    def add(self, count: int) -> None:
        self._bytes += count
        if time.monotonic() - self._told >= _TELL_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._bytes:
            self._connection.send(("passed", self._bytes))
        self._bytes, self._told = 0, time.monotonic()


def _as_error(name: str, message: str, trace: str) -> Exception:
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, MegatuneError):
        return kind(message)
    return RuntimeError(f"a process of the conversion failed with {name}: {message}\n{trace}")
