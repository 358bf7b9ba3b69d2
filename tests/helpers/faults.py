"""Whole jobs (agents and ranks) that are hurt at a chosen moment, quickly: everything is forked from one process that
has imported torch and megatune already, where a job of its own would spend seconds on imports.

Product code has no hooks for this: a rank's `Heartbeat` is wrapped after the fork, so that the fault comes exactly when
the rank says that it enters a phase.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatune.training.heartbeat import END, EVALUATE, PHASES, SAVE, Heartbeat
from tests.helpers.dist import PRELOAD


@dataclass(frozen=True)
class Fault:
    """When rank `rank` enters `phase` of `step` for the `nth` time, `kind` happens to it, after `delay` seconds in
    which it goes on; once in a job unless `always`. Kinds: kill, segfault, raise, stop (SIGSTOP), sleep (for `delay`
    seconds), term (SIGTERM to this rank alone), term agent."""

    rank: int
    step: int
    phase: str
    kind: str = "kill"
    nth: int = 0
    delay: float = 0.0
    always: bool = False


@dataclass
class Outcome:
    """`codes`: the agents'. `events`: what ranks and agents noted, in order. `alive`: processes that outlived it."""

    codes: list[int | None]
    events: list[dict[str, Any]]
    alive: list[int]
    seconds: float
    logs: Path
    said: str

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["what"] == kind]

    def log(self, rank: int, generation: int = 0) -> str:
        return (self.logs / f"gen-{generation}" / f"rank-{rank:05d}.log").read_text("utf-8", "replace")

    def resumed(self, generation: int) -> int:
        """The step from which that start went on."""
        found = re.search(r"resuming from \S+ \(step (\d+)\)", self.log(0, generation))
        return int(found[1]) if found else 0


@dataclass(frozen=True)
class Request:
    config: str
    folder: str
    nodes: int
    nproc: int
    faults: tuple[Fault, ...] = ()
    restarts: int = 3
    hang: float = 0.0
    grace: float = 4.0
    join: float = 20.0
    # (seconds after the first finished step, node): SIGKILL to an agent.
    kill_agent: int | None = None
    overrides: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


class Zygote:
    """Makes jobs. One a test module: it keeps a process with torch."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_zygote, args=(theirs,))
        self._process.start()
        theirs.close()

    def run(self, request: Request, timeout: float = 120.0) -> Outcome:
        """Run a job to its end. AssertionError where it has none within `timeout` seconds: it hangs."""
        self._pipe.send_bytes(pickle.dumps((request, timeout)))
        codes, alive, seconds = pickle.loads(self._pipe.recv_bytes())
        folder = Path(request.folder)
        said = "".join(path.read_text("utf-8", "replace") for path in sorted(folder.glob("agent-*.out")))
        assert None not in codes, f"the job hangs: {request}\n{said}"
        lines = (folder / "events.jsonl").read_text().splitlines() if codes else []
        return Outcome(codes, [json.loads(line) for line in lines], alive, seconds, folder / "logs", said)

    def close(self) -> None:
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def faults(
    seed: int, count: int, world: int, steps: int, save_every: int, eval_every: int
) -> list[tuple[Fault, ...]]:
    """`count` seeded deaths that go round all phases; ranks, steps and moments within the phase are drawn."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        phase = _ROUND[number % len(_ROUND)]
        step, nth, delay = draw.randint(1, steps), 0, 0.0
        if phase == "end":
            phase, step = draw.choice([("end", steps), ("start", 0)])
        elif phase == "evaluate":
            step, nth = draw.choice([*range(eval_every, steps, eval_every), steps]), draw.randint(0, 2)
        elif phase == "save":
            step = draw.choice([*range(save_every, steps, save_every), steps])
            delay = draw.choice([0.0, draw.random() * 0.1])  # in the copy, or while the files are written
        elif phase in ("forward", "backward"):
            nth = draw.randint(0, 1)
        kind = draw.choice(["kill", "kill", "kill", "segfault", "raise"]) if not delay else "kill"
        found.append((Fault(draw.randrange(world), step, phase, kind, nth, delay),))
    return found


_ROUND = ("fetch", "forward", "backward", "reduce", "optimizer", "save", "evaluate", "end")


def _zygote(pipe: Connection) -> None:
    import torch

    import megatune.checkpoint
    import megatune.launch.rank
    import megatune.serve
    import megatune.training.run
    import megatune.training.samples  # noqa: F401

    torch.set_num_threads(1)
    try:
        while True:
            request, timeout = pickle.loads(pipe.recv_bytes())
            pipe.send_bytes(pickle.dumps(_job(request, timeout)))
    except EOFError:
        os._exit(0)


def _job(request: Request, timeout: float) -> tuple[list[int | None], list[int], float]:
    folder = Path(request.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.monotonic()
    before = os.times().children_user + os.times().children_system
    agents = [_fork(_agent, request, node, port) for node in range(request.nodes)]
    codes: list[int | None] = [None] * request.nodes
    killed = False
    while None in codes and time.monotonic() < began + timeout:
        for node, pid in enumerate(agents):
            if codes[node] is None and os.waitpid(pid, os.WNOHANG)[0]:
                codes[node] = -9 if killed and node == request.kill_agent else _code(folder, node)
        if request.kill_agent is not None and not killed and '"finished"' in _events(folder):
            _note(folder, "agent killed", node=request.kill_agent)
            os.kill(agents[request.kill_agent], signal.SIGKILL)
            killed = True
        time.sleep(0.01)
    seconds = time.monotonic() - began
    used = os.times()
    _note(folder, "over", cpu_seconds=used.children_user + used.children_system - before)
    time.sleep(0.1)
    pids = [json.loads(line)["pid"] for line in _events(folder).splitlines() if '"rank started"' in line]
    alive = [pid for pid in pids if _is_alive(pid)]
    for pid in (*alive, *(agent for agent, code in zip(agents, codes, strict=True) if code is None)):
        os.kill(pid, signal.SIGKILL)
    return codes, alive, seconds


def _code(folder: Path, node: int) -> int:
    return int((folder / f"agent-{node}.code").read_text())


def _events(folder: Path) -> str:
    return (folder / "events.jsonl").read_text()


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _note(folder: Path, what: str, **facts: Any) -> None:
    line = json.dumps({"what": what, "at": time.monotonic(), **facts}) + "\n"
    descriptor = os.open(folder / "events.jsonl", os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def _fork(function: Any, *args: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        function(*args)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(70)


def _agent(request: Request, node: int, port: int) -> None:
    from megatune.launch import agent
    from megatune.launch.restart import Restarts
    from megatune.launch.watch import Limits

    folder = Path(request.folder)
    output = os.open(folder / f"agent-{node}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    redirect(output, output)
    plain = Restarts.seen

    def seen(self: Restarts, finished: int, saved: int) -> None:
        _note(folder, "ended", finished=finished, saved=saved)
        plain(self, finished, saved)

    Restarts.seen = seen
    agent._BEATS = 0.1
    job = agent.Job(
        command=["train", request.config, *request.overrides],
        nproc=request.nproc,
        logs=folder / "logs",
        nodes=request.nodes,
        node=node,
        endpoint=("127.0.0.1", port),
        run_id="faults",
        secret="secret",
        env={**request.env, "OMP_NUM_THREADS": "1"},
        restarts=request.restarts,
        limits=Limits(request.hang, 60.0),
        join_timeout=request.join,
        grace=request.grace,
    )

    def spawn(command: Sequence[str], variables: Mapping[str, str], stdout: int, stderr: int) -> Forked:
        return _spawn(request, command, variables, stdout, stderr)

    code = agent.run_job(job, spawn)
    (folder / f"agent-{node}.code").write_text(str(code))


class Forked:
    def __init__(self, pid: int) -> None:
        self.pid = pid

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _spawn(
    request: Request, command: Sequence[str], variables: Mapping[str, str], stdout: int, stderr: int
) -> Forked:
    parent = os.getpid()
    return forked(lambda: _rank(request, parent, command), variables, stdout, stderr)


def forked(program: Callable[[], None], variables: Mapping[str, str], stdout: int, stderr: int) -> Forked:
    """A rank that runs `program` in a fork of this process, its agent's: as if it had been started, but imported."""
    from megatune.launch.ranks import in_child

    prepare = in_child(os.getpid())
    pid = os.fork()
    if pid:
        return Forked(pid)
    code = 70
    try:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        prepare()
        redirect(stdout, stderr)
        os.closerange(3, 256)
        os.environ.clear()
        os.environ.update(variables)
        program()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def redirect(stdout: int, stderr: int) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (stdout, 1), (stderr, 2)):
        os.dup2(source, target)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def _rank(request: Request, agent: int, command: Sequence[str]) -> None:
    from megatune import cli

    rank, folder = int(os.environ["RANK"]), Path(request.folder)
    _note(folder, "rank started", rank=rank, pid=os.getpid())
    for number, fault in enumerate(request.faults):
        if fault.rank == rank and fault.phase == "start":
            _hurt(fault, folder, number, agent, 0)
        elif fault.rank == rank:
            _prepare(fault, folder, number, agent)
    if rank == 0:
        _note_steps(folder)
    cli.commands(args=list(command), prog_name="megatune")


def _note_steps(folder: Path) -> None:
    plain = Heartbeat.finished

    def finished(self: Heartbeat, step: int) -> None:
        plain(self, step)
        _note(folder, "finished", step=step)

    Heartbeat.finished = finished


def _prepare(fault: Fault, folder: Path, number: int, agent: int) -> None:
    plain, wanted = Heartbeat.phase, PHASES.index(fault.phase)
    seen = 0

    def phase(self: Heartbeat, now: int) -> None:
        nonlocal seen
        plain(self, now)
        if now != wanted or self._step != fault.step:
            return
        seen += 1
        # A short evaluation has fewer beats than were drawn.
        if seen == fault.nth + 1 or (wanted in (EVALUATE, SAVE, END) and seen == 1):
            _hurt(fault, folder, number, agent, self._words[4])

    Heartbeat.phase = phase


def _hurt(fault: Fault, folder: Path, number: int, agent: int, saved: int) -> None:
    marker = folder / f"fault-{number}"
    if marker.exists() and not fault.always:
        return
    marker.touch()
    if fault.kind == "sleep":
        time.sleep(fault.delay)
        return

    def strike() -> None:
        _note(folder, "fault", saved=saved, **asdict(fault))
        if fault.kind == "raise":
            raise RuntimeError("an error that was put there")
        number = {"segfault": signal.SIGSEGV, "stop": signal.SIGSTOP}.get(fault.kind, signal.SIGKILL)
        if fault.kind.startswith("term"):
            number = signal.SIGTERM
        os.kill(agent if fault.kind == "term agent" else os.getpid(), number)

    if fault.delay:
        threading.Timer(fault.delay, strike).start()
    else:
        strike()
