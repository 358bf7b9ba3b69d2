"""The agent of one node: starts and watches that node's ranks, and does what node 0's agent orders. Imports no torch.

One loop, no threads. Node 0's agent also holds the `Coordinator` and the other agents' connections; a job of one
machine is an agent without any.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megatune.errors import ParallelError
from megatune.launch import codes, network, wire
from megatune.launch.coordinator import Coordinator, Message
from megatune.launch.environment import usable_cores
from megatune.launch.ranks import FORWARDED, Rank, Ranks, Spawn
from megatune.launch.report import MAX_TEXT
from megatune.launch.restart import Restarts
from megatune.launch.watch import Limits

_WATCHED = (*FORWARDED, signal.SIGCHLD)
_TICK = 0.25  # seconds between looks at what nobody announces
_BEATS = 1.0  # seconds between reports of what ranks are doing
SILENT_SECONDS = 60.0  # an agent that says nothing for so long is lost, though its machine answers
_FAREWELL_SECONDS = 5.0
_PAUSED_SECONDS = 10.0  # a turn of the loop takes milliseconds
# A killed rank is noticed when it is reaped; a peer's complaint about it may have been earlier.
_KILL_HEAD_START = 2.0


@dataclass(frozen=True)
class Job:
    """One run on `nodes` machines as the agent of machine `node` sees it. `command`: a rank's program; `endpoint`:
    where node 0's agent listens; `logs`: folder for `gen-<G>/`; `grace`: seconds between SIGTERM and SIGKILL when
    another rank failed."""

    command: Sequence[str]
    nproc: int
    logs: Path
    nodes: int = 1
    node: int = 0
    endpoint: tuple[str, int] = ("127.0.0.1", 0)
    run_id: str = ""
    secret: str = ""
    generation: int = 0
    env: Mapping[str, str] = field(default_factory=dict)
    restarts: int = 0
    limits: Limits = field(default_factory=Limits)
    join_timeout: float = 300.0
    grace: float = 4.0


def run_job(job: Job, spawn: Spawn | None = None) -> int:
    """Be the agent of `job` on this node until the job is over; returns its exit code (launch/codes.py). Call it from
    the main thread. Raises ParallelError where the job cannot be."""
    if job.nproc < 1:
        raise ParallelError(f"launch.nproc: {job.nproc} processes cannot be started; use 1 or more")
    if job.nodes > 1 and not job.secret:
        raise ParallelError(
            f"{wire.SECRET} is not set; agents of several nodes need the same random text in it"
        )
    with _Agent(job, spawn) as agent:
        return agent.run()


class _Agent:
    def __init__(self, job: Job, spawn: Spawn | None) -> None:
        self.job, self._spawn = job, spawn
        self.host = socket.gethostname()
        self.code: int | None = None
        self.ranks: Ranks | None = None
        self._log: Path | None = None
        self._key = wire.job_key(job.secret, job.run_id, job.generation)
        self._stack = ExitStack()
        self._received: dict[int, int] = {}
        self._next_beats = 0.0
        self._told_end = False
        self._waited = self._awake_since = time.monotonic()
        self._address = job.endpoint[0]
        # Node 0:
        self.coordinator: Coordinator | None = None
        self._server: socket.socket | None = None
        self._greetings: list[wire.Greeting] = []
        self._peers: dict[int, tuple[wire.Wire, float]] = {}
        self._port = ExitStack()
        # The others:
        self._link: wire.Wire | None = None
        self._heard = 0.0

    def __enter__(self) -> _Agent:
        job, stack = self.job, self._stack
        self._selector = stack.enter_context(selectors.DefaultSelector())
        self._scratch = Path(stack.enter_context(_scratch_folder()))
        stack.callback(self._close_ranks)
        self._wakeup = stack.enter_context(_signals_noted())
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        if job.node == 0:
            self.coordinator = Coordinator(
                nodes=job.nodes,
                address=job.endpoint[0],
                restarts=Restarts(job.restarts),
                limits=job.limits,
                grace=job.grace,
                join_timeout=job.join_timeout,
                generation=_next_generation(job.logs, job.generation),
                reserve=self._reserve_port,
                say=self._say,
            )
            stack.callback(lambda: self._port.close())
            if job.nodes > 1:
                self._server = stack.enter_context(network.listen(*job.endpoint))
                self._selector.register(self._server, selectors.EVENT_READ)
                self._address = network.address_of(job.endpoint[0])
        return self

    def __exit__(self, *_: object) -> None:
        for connection in (
            *(peer for peer, _ in self._peers.values()),
            *(one.wire for one in self._greetings),
        ):
            connection.close()
        if self._link is not None:
            self._link.close()
        self._stack.close()

    def run(self) -> int:
        if self.job.node:
            self._join()
        if self.code is None:
            self._tell({"kind": "hello", "nproc": self.job.nproc, "host": self.host})
        while self.code is None:
            self._wait()
            self._take_signals()
            if self.ranks is not None:
                self._look_after(self.ranks)
            if self.coordinator is None:
                self._follow()
            else:
                self._lead(self.coordinator)
        self._farewell()
        return self.code

    # What every agent does.

    def _wait(self) -> None:
        now = time.monotonic()
        if now - self._waited > _PAUSED_SECONDS:
            # The scheduler had stopped all of this job's processes: the silence was not the ranks' own.
            self._awake_since, self._next_beats = now, 0.0
            if self.coordinator is not None:
                self.coordinator.awakened()
        limit = _TICK
        if self.ranks is not None and self.ranks.wakes_at is not None:
            limit = max(0.0, min(limit, self.ranks.wakes_at - time.monotonic()))
        for key, _ in self._selector.select(limit):
            if isinstance(key.fileobj, int):
                self._copy_output(key.fileobj)
        self._waited = time.monotonic()

    def _copy_output(self, source: int) -> None:
        tee = self.ranks.tee if self.ranks is not None else None
        if tee is not None:
            tee.copy(source)
        if tee is None or source not in tee.sources:
            self._selector.unregister(source)

    def _take_signals(self) -> None:
        try:
            numbers = self._wakeup.recv(4096)
        except BlockingIOError:
            return
        for number in numbers:
            if number in FORWARDED:
                self._forward(number)

    def _forward(self, number: int) -> None:
        """To the ranks, once each; a second SIGINT also starts the grace time, a third ends it."""
        times = self._received[number] = self._received.get(number, 0) + 1
        if times == 1:
            self._tell({"kind": "stop", "signal": number})
        if self.ranks is None or not self.ranks.running:
            waits = self._link is None if self.coordinator is None else self.coordinator.state == "joining"
            if waits:  # nobody else has begun anything
                self.code = codes.STOPPED if number != signal.SIGINT else 128 + number
            return
        if times == 1 or (times == 2 and number == signal.SIGINT):
            self.ranks.forward(number)
        if times > 1 and number == signal.SIGINT:
            self.ranks.end(self.job.grace if times == 2 else 0.0, asks=False)

    def _look_after(self, ranks: Ranks) -> None:
        for one in ranks.reap():
            if one.ended[1] not in codes.CLEAN:
                self._tell(self._death(one))
        ranks.kill_if_due()
        if ranks.running:
            if time.monotonic() >= self._next_beats:
                self._next_beats = time.monotonic() + _BEATS
                found = [
                    [one.rank, *vars(one.beat.read(self._awake_since)).values()] for one in ranks.running
                ]
                self._tell({"kind": "beats", "ranks": found})
        elif not self._told_end:
            self._told_end = True
            beats = [one.beat.read() for one in ranks.all]
            self._tell(
                {
                    "kind": "ended",
                    "codes": [one.ended[1] for one in ranks.all],
                    "finished": max(beat.finished for beat in beats),
                    "saved": max(beat.saved for beat in beats),
                }
            )

    def _death(self, one: Rank) -> Message:
        at, code = one.ended
        failure, beat = one.failure(), one.beat.read()
        is_shown = one.rank == 0 and self.ranks.shows_first
        if failure is not None:
            text, ago = failure.text, max(0.0, time.time() - failure.time)
            if one.was_told_to_end:  # it was on its way out when it was ended for a peer's failure
                code = codes.USER_ERROR if failure.is_user_error else 1
        else:
            text = "" if is_shown else one.tail()
            if code == codes.USER_ERROR:
                text = text.rpartition("\n")[2].removeprefix("megatune: ")
            ago = time.monotonic() - at + _KILL_HEAD_START * (code in codes.KILLED)
        return {
            "kind": "death",
            "rank": one.rank,
            "code": code,
            "ago": ago,
            "step": beat.step,
            "where": beat.where,
            "text": text if code == codes.USER_ERROR else text[-MAX_TEXT:],
            "log": str(one.log),
            "is_user_error": failure is not None and failure.is_user_error,
            "is_reported": failure is not None,
            "is_first_hand": failure is not None or not one.was_told_to_end,
        }

    def _obey(self, order: Message) -> None:
        kind = order.get("kind")
        if kind == "start":
            self._start(order)
        elif kind == "end" and self.ranks is not None:
            self.ranks.end(float(order["grace"]))
        elif kind == "dump" and self.ranks is not None:
            self.ranks.forward(signal.SIGUSR2)
        elif kind == "exit":
            self.code = int(order["code"])

    def _start(self, order: Message) -> None:
        job = self.job
        self._close_ranks()
        logs = job.logs / f"gen-{int(order['generation'])}"
        try:
            logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ParallelError(f"{logs}: logs cannot be written there ({error.strerror})") from error
        self._log = logs / f"node-{job.node}.log"
        scratch = self._scratch / logs.name
        scratch.mkdir()
        variables = {**os.environ, **job.env}
        variables.pop(wire.SECRET, None)
        # torch's default is all cores for each process, which is slower than one thread when they fight.
        variables.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // job.nproc)))
        variables.setdefault("PYTHONFAULTHANDLER", "1")
        interface = network.interface_of(self._address) if job.nodes > 1 else None
        if interface is not None:  # else gloo asks what the host's own name means, which may be its loopback
            variables.setdefault("GLOO_SOCKET_IFNAME", interface)
        self.ranks = Ranks(job.command, variables, logs, scratch, job.node == 0, self._spawn)
        self._told_end, self._next_beats = False, 0.0
        world_size, first = int(order["world_size"]), int(order["first"])
        self._note(f"ranks {first} to {first + job.nproc - 1} of {world_size} start on {self.host}")
        self.ranks.start(first, job.nproc, world_size, str(order["address"]), int(order["port"]))
        if self.ranks.tee is not None:
            for source in self.ranks.tee.sources:
                self._selector.register(source, selectors.EVENT_READ)
        for number in self._received:  # asked to stop since the last start ended
            self.ranks.forward(number)

    def _close_ranks(self) -> None:
        if self.ranks is None:
            return
        if self.ranks.tee is not None:
            for source in self.ranks.tee.sources:
                self._selector.unregister(source)
        self.ranks.close()
        self.ranks = None
        if sys.stdout.isatty():
            print("\x1b[?25h", end="", flush=True)  # rank 0's progress line may have hidden the cursor

    def _tell(self, message: Message) -> None:
        """To node 0's coordinator."""
        if self.coordinator is not None:
            self.coordinator.handle(0, message, time.monotonic())
        elif self._link is not None:
            self._link.send(message)

    def _say(self, text: str) -> None:
        """For a person: on the terminal and in this node's log."""
        if self.ranks is not None and self.ranks.tee is not None:
            for source in self.ranks.tee.sources:
                self._copy_output(source)
        print(f"megatune: {text}", file=sys.stderr, flush=True)
        self._note(text)

    def _note(self, text: str) -> None:
        if self._log is not None:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            with open(self._log, "a", encoding="utf-8") as file:
                file.write(f"{stamp} {text}\n")

    # Node 0.

    def _reserve_port(self) -> int:
        self._port.close()
        return self._port.enter_context(network.reserved_port())

    def _lead(self, coordinator: Coordinator) -> None:
        self._greet()
        now = time.monotonic()
        for number, (peer, heard) in list(self._peers.items()):
            messages = peer.receive()
            if messages:
                self._peers[number] = peer, now
            try:
                for message in messages:
                    coordinator.handle(number, message, now)
            except (KeyError, TypeError, ValueError):
                peer.is_open = False
            heard = max(now if messages else heard, self._awake_since)
            if not peer.is_open or now - heard > SILENT_SECONDS:
                self._drop(number, "its agent ended or its machine does not answer")
        coordinator.tick(now)
        while coordinator.outbox:
            number, order = coordinator.outbox.pop(0)
            if number == 0:
                self._obey(order)
            elif number in self._peers:
                self._peers[number][0].send(order)
        for peer, _ in self._peers.values():
            peer.flush()

    def _greet(self) -> None:
        if self._server is None:
            return
        try:
            while len(self._greetings) < 64 + 4 * self.job.nodes:
                sock, _ = self._server.accept()
                greeting = wire.Greeting(sock, self._key, self.job.nodes)
                self._greetings.append(greeting)
        except BlockingIOError:
            pass
        for greeting in list(self._greetings):
            number = greeting.node()
            if number is not None and number not in self._peers:
                self._peers[number] = greeting.wire, time.monotonic()
                self._selector.register(greeting.wire, selectors.EVENT_READ)
            elif number is not None:
                greeting.wire.close()  # somebody else is that node already
            if number is not None or not greeting.wire.is_open:
                self._greetings.remove(greeting)

    def _drop(self, number: int, why: str) -> None:
        peer, _ = self._peers.pop(number)
        self._selector.unregister(peer)
        peer.close()
        self.coordinator.lost(number, time.monotonic(), why)

    def _farewell(self) -> None:
        """Let the others hear the last order before the connections close."""
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while self._peers and time.monotonic() < deadline:
            for number, (peer, _) in list(self._peers.items()):
                peer.flush()
                peer.receive()
                if not peer.is_open:
                    del self._peers[number]
            time.sleep(0.02)

    # The others.

    def _join(self) -> None:
        job = self.job
        deadline = time.monotonic() + job.join_timeout
        while self.code is None:
            found = wire.connect(*job.endpoint, self._key, job.node, timeout=3.0)
            if isinstance(found, wire.Wire):
                self._link, self._heard = found, time.monotonic()
                self._address = found.sock.getsockname()[0]
                self._selector.register(found, selectors.EVENT_READ)
                return
            if time.monotonic() > deadline:
                host, port = job.endpoint
                self._say(f"node {job.node} cannot reach node 0's agent at {host}:{port}: {found}")
                self.code = codes.LOST
                return
            self._selector.select(0.2)
            self._take_signals()

    def _follow(self) -> None:
        for order in self._link.receive():
            self._obey(order)
        self._link.flush()
        if self._link.is_open or self.code is not None:
            return
        self._say(f"node 0's agent at {self.job.endpoint[0]}:{self.job.endpoint[1]} is lost")
        if self.ranks is not None:
            self.ranks.end(self.job.grace)
            while self.ranks.running:
                self._wait_for_end(self.ranks)
        self.code = codes.LOST

    def _wait_for_end(self, ranks: Ranks) -> None:
        time.sleep(0.05)
        ranks.reap()
        ranks.kill_if_due()


def _next_generation(logs: Path, wanted: int) -> int:
    """The number of this start: no older start's logs are written to."""
    taken = [int(path.name[4:]) for path in logs.glob("gen-*") if path.name[4:].isdecimal()]
    return max([wanted, *(number + 1 for number in taken)])


def _scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """In memory where possible: ranks must not wait for a disk when they say what they are doing."""
    memory = Path("/dev/shm")
    where = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="megatune-", dir=where)


@contextmanager
def _signals_noted() -> Iterator[socket.socket]:
    """A socket from which the numbers of the signals that came can be read."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    before = {number: signal.signal(number, _do_nothing) for number in _WATCHED}
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        yield ours
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        ours.close()
        theirs.close()


def _do_nothing(_number: int, _frame: object) -> None:
    """The number is in the socket."""
