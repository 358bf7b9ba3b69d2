"""What node 0's agent decides for the whole job: when ranks start, that all end when one dies, whether it goes on.

No sockets, processes or clocks here: messages of agents go in (`handle`, `lost`, `tick`, with the time), orders for
agents come out of `outbox`.

| message of an agent | means |
| --- | --- |
| hello: nproc, host | this node is there |
| beats: [rank, word ...] | what its ranks are doing, every second |
| death: rank, code, ... | one of its ranks failed |
| ended: codes, finished, saved | none of its ranks runs any more |
| stop: signal | it was asked to stop; its ranks know |

| order | means |
| --- | --- |
| start: generation, first, world_size, address, port | start ranks |
| dump | write the stacks of all ranks to their logs |
| end: grace | end all ranks: SIGTERM, after `grace` seconds SIGKILL |
| exit: code | the job is over |
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatune.launch import codes, report
from megatune.launch.report import Death
from megatune.launch.restart import Restarts
from megatune.launch.watch import Limits, hanging
from megatune.training.heartbeat import Beat

Message = dict[str, Any]
DUMP_SECONDS = 2.0  # for the stacks to be written
HANG_CODE = 128 + signal.SIGKILL


@dataclass
class _Node:
    host: str
    nproc: int
    first: int = 0
    ended: list[int] | None = None
    beats: dict[int, tuple[float, Beat]] = field(default_factory=dict)


@dataclass
class Coordinator:
    """`reserve`: a port for a new generation's ranks; `say`: a report for people. `state`: joining, running, dumping,
    ending, waiting (for the next start), over."""

    nodes: int
    address: str
    restarts: Restarts
    limits: Limits
    grace: float
    join_timeout: float
    generation: int
    reserve: Callable[[], int]
    say: Callable[[str], None]
    state: str = "joining"
    code: int | None = None
    outbox: list[tuple[int, Message]] = field(default_factory=list)
    _joined: dict[int, _Node] = field(default_factory=dict)
    _lost: dict[int, str] = field(default_factory=dict)
    _deaths: list[Death] = field(default_factory=list)
    _signals: set[int] = field(default_factory=set)
    _hang: Death | None = None
    _due: float | None = None

    @property
    def world_size(self) -> int:
        return sum(node.nproc for node in self._joined.values())

    def handle(self, number: int, message: Message, now: float) -> None:
        """A message of node `number`."""
        kind = message.get("kind")
        if kind == "hello":
            self._joined[number] = _Node(str(message["host"]), int(message["nproc"]))
            if len(self._joined) == self.nodes:
                self._start()
        elif kind == "beats":
            self._joined[number].beats = {
                int(rank): (now, Beat(*values)) for rank, *values in message["ranks"]
            }
        elif kind == "death":
            self._death(self._joined[number], message, now)
        elif kind == "ended":
            node = self._joined[number]
            node.ended, node.beats = [int(code) for code in message["codes"]], {}
            self.restarts.seen(int(message["finished"]), int(message["saved"]))
            self._all_ended(now)
        elif kind == "stop":
            self._signals.add(int(message["signal"]))
            if self.state == "waiting":
                self._over(self._stopped_code())

    def lost(self, number: int, now: float, why: str) -> None:
        """The agent of a node is gone."""
        if self.state == "over" or number in self._lost:
            return
        node = self._joined.get(number)
        self._lost[number] = f"node {number}" + (f" ({node.host})" if node else "") + f" is lost: {why}"
        if node is None or self.state in ("joining", "waiting"):
            self._give_up()
            return
        node.ended = []
        if self.state != "ending":
            self._end(self.grace)
        self._all_ended(now)

    def awakened(self) -> None:
        """The job was stopped as a whole and goes on: what was known about its ranks is old."""
        for node in self._joined.values():
            node.beats = {}

    def tick(self, now: float) -> None:
        """Whatever time alone brings about."""
        if self.state == "joining":
            self._due = self._due or now + self.join_timeout
            if now >= self._due:
                missing = [number for number in range(self.nodes) if number not in self._joined]
                names = ", ".join(map(str, missing))
                self.say(
                    f"{'node' if len(missing) == 1 else 'nodes'} {names} of {self.nodes} did not come within "
                    f"{self.join_timeout:g} s; look at their logs, and whether they reach {self.address}"
                )
                self._over(codes.LOST)
        elif self.state == "running":
            self._look_for_a_hang(now)
        elif self.state == "dumping" and now >= self._due:
            self._end(0.0)
        elif self.state == "waiting" and now >= self._due:
            self._start()

    def _start(self) -> None:
        self.state, self._due = "running", None
        self._deaths, self._hang = [], None
        port, first = self.reserve(), 0
        for _, node in sorted(self._joined.items()):
            node.first, node.ended, node.beats = first, None, {}
            first += node.nproc
        for number, node in sorted(self._joined.items()):
            order = {"kind": "start", "generation": self.generation, "first": node.first, "port": port}
            self.outbox.append((number, order | {"world_size": first, "address": self.address}))

    def _death(self, node: _Node, message: Message, now: float) -> None:
        self._deaths.append(
            Death(
                rank=int(message["rank"]),
                host=node.host,
                code=int(message["code"]),
                at=now - float(message["ago"]),
                step=int(message["step"]),
                where=str(message["where"]),
                text=str(message["text"]),
                log=str(message["log"]),
                is_user_error=bool(message["is_user_error"]),
                is_reported=bool(message["is_reported"]),
                is_first_hand=bool(message["is_first_hand"]),
            )
        )
        if self.state in ("running", "dumping"):
            self._end(self.grace)

    def _end(self, grace: float) -> None:
        self.state = "ending"
        self._order({"kind": "end", "grace": grace})

    def _order(self, order: Message) -> None:
        self.outbox += [(number, order) for number in sorted(self._joined) if number not in self._lost]

    def _look_for_a_hang(self, now: float) -> None:
        beats: list[tuple[int, Beat]] = []
        for node in self._joined.values():
            if node.ended is None and not node.beats:
                return  # its ranks are being started
            for rank, (at, beat) in node.beats.items():
                beats.append((rank, _aged(beat, now - at)))
        found = hanging(beats, self.limits)
        if found is None:
            return
        rank, beat = found
        (node,) = [one for one in self._joined.values() if one.first <= rank < one.first + one.nproc]
        others = "\n".join(
            f"rank {number}: {one.where} since {one.silent:.0f} s" for number, one in sorted(beats)[:64]
        )
        self._hang = Death(
            rank=rank,
            host=node.host,
            code=HANG_CODE,
            at=now,
            step=beat.step,
            where=beat.where,
            text=f"{others}\nstacks of all ranks are in their logs (rank-*.log)",
            log="",
            is_user_error=False,
            is_reported=False,
            is_first_hand=True,
        )
        self.state, self._due = "dumping", now + DUMP_SECONDS
        self._order({"kind": "dump"})

    def _all_ended(self, now: float) -> None:
        if any(node.ended is None for node in self._joined.values()) or self.state not in (
            "running",
            "dumping",
            "ending",
        ):
            return
        if self._lost:
            self._give_up()
            return
        ended = [code for node in self._joined.values() for code in node.ended]
        first = self._hang or report.first(self._deaths)
        if first is None:
            clean = all(code in codes.CLEAN for code in ended)
            # Else they were killed after a second Ctrl-C.
            self._over(max(ended) if clean else 128 + signal.SIGINT)
        elif first.code == codes.USER_ERROR or first.is_user_error:
            if first.text:
                self.say(first.text)
            self._over(codes.USER_ERROR)
        elif first.code - 128 in self._signals:
            self._over(self._stopped_code())  # it did as it was asked to
        else:
            self._failed(first, now)

    def _failed(self, first: Death, now: float) -> None:
        if self._hang is not None:
            text = (
                f"rank {first.rank} of {self.world_size} ({first.host}) hangs {first.where}; all were ended"
            )
            lines = [text, *(f"  {line}" for line in first.text.splitlines())]
            self.say("\n".join(lines))
        else:
            self.say(report.describe(first, self.world_size, self.nodes))
        if self._signals:
            self._over(codes.LOST if self.restarts.limit else first.code)
            return
        reason = self.restarts.stop_reason(first)
        if reason is None:
            self.generation += 1
            self.state, self._due = "waiting", now + self.restarts.pause
            self.say(
                f"starting again from the newest checkpoint (restart {self.restarts.used} of "
                f"{self.restarts.limit} without progress)"
            )
            return
        if reason:
            self.say(f"not started again: {reason}")
        self._over(codes.NO_PROGRESS if reason else first.code)

    def _stopped_code(self) -> int:
        return 128 + signal.SIGINT if self._signals == {int(signal.SIGINT)} else codes.STOPPED

    def _give_up(self) -> None:
        for text in self._lost.values():
            self.say(text)
        first = report.first(self._deaths)
        if first is not None:
            self.say(report.describe(first, self.world_size, self.nodes))
        self._over(codes.LOST)

    def _over(self, code: int) -> None:
        self.state, self.code = "over", code
        self._order({"kind": "exit", "code": code})


def _aged(beat: Beat, seconds: float) -> Beat:
    """As it would look by now if nothing had changed since."""
    return Beat(**{**vars(beat), "silent": beat.silent + seconds})
