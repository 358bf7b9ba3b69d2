"""What a rank sends and receives under a schedule, worked out before the step from the actions of all ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from megatune.parallel.pipeline.schedules import Action, forward_only, held, owners, schedule


@dataclass(frozen=True, slots=True)
class Message:
    """What stage number `stage` has made of a micro-batch for its neighbour: F: its output, for the next stage; B: the
    gradient of its input, for the stage before."""

    kind: Literal["F", "B"]
    stage: int
    micro_batch: int


@dataclass(frozen=True, order=True, slots=True)
class Channel:
    """Messages of one kind from one pipeline rank to another; they arrive in the order in which they were sent."""

    source: int
    target: int
    kind: Literal["F", "B"]


@dataclass(frozen=True)
class Plan:
    """A rank's part of a step.

    `incoming`: what comes from other ranks, by channel, in the sender's order. `received[i]`: messages sent before
    that are known to have been received once action i has what it needs. `is_last[i]`: action i is the last B or I of
    its stage.
    """

    actions: tuple[Action, ...]
    incoming: dict[Channel, tuple[Message, ...]]
    received: tuple[tuple[Message, ...], ...]
    is_last: tuple[bool, ...]


@dataclass(frozen=True)
class Traffic:
    """Who sends what to whom. `owner[s]`: rank of stage s. `wanted[s]`: the input of stage s needs a gradient."""

    owner: tuple[int, ...]
    wanted: tuple[bool, ...]

    @property
    def last(self) -> int:
        return len(self.owner) - 1

    def made(self, action: Action) -> Message | None:
        """What the next or previous stage gets from an action."""
        kind, stage = action.kind, action.stage
        if kind == "F":
            return Message("F", stage, action.micro_batch) if stage < self.last else None
        return Message("B", stage, action.micro_batch) if kind != "W" and self.wanted[stage] else None

    def needed(self, action: Action) -> Message | None:
        """What an action needs from the previous or next stage."""
        kind, stage = action.kind, action.stage
        if kind == "F":
            return Message("F", stage - 1, action.micro_batch) if stage > 0 else None
        if kind == "W" or stage == self.last or not self.wanted[stage + 1]:
            return None
        return Message("B", stage + 1, action.micro_batch)

    def channel(self, message: Message) -> Channel | None:
        """Which way a message goes; None where both stages are on one rank."""
        other = message.stage + (1 if message.kind == "F" else -1)
        source, target = self.owner[message.stage], self.owner[other]
        return None if source == target else Channel(source, target, message.kind)

    def channels(self) -> list[Channel]:
        """All that there can be, wanted gradients or not."""
        stages = range(self.last)
        ways = [self.channel(Message("F", stage, 0)) for stage in stages]
        ways += [self.channel(Message("B", stage + 1, 0)) for stage in stages]
        return sorted({way for way in ways if way is not None})


@lru_cache(maxsize=16)
def training_plan(
    name: str, pp: int, virtual: int, rank: int, wanted: tuple[bool, ...], micro_batches: int
) -> Plan:
    """Plan of `rank` for forward and backward; `wanted` as in `Traffic`."""
    ranks = schedule(name, pp, virtual, micro_batches)
    traffic = Traffic(tuple(owners(name, pp, virtual)), wanted)
    actions = ranks[rank]
    return Plan(actions, _incoming(ranks, rank, traffic), _received(ranks, rank, traffic), _is_last(actions))


@lru_cache(maxsize=16)
def evaluation_plan(name: str, pp: int, virtual: int, rank: int, micro_batches: int) -> Plan:
    """Plan of `rank` for forward passes alone.

    Nothing comes back that would tell what has been received, so a rank waits itself, for what it has sent in the group
    of micro-batches before: all ranks are through with that one once nobody waits for anything older.
    """
    ranks = [tuple(forward_only(held(name, pp, other, virtual), pp, micro_batches)) for other in range(pp)]
    owner = tuple(owners(name, pp, virtual))
    traffic = Traffic(owner, (False,) * len(owner))
    window = pp * virtual
    sent: dict[Channel, list[Message]] = defaultdict(list)
    received: list[tuple[Message, ...]] = []
    for message, way in _outgoing(ranks[rank], traffic):
        due: tuple[Message, ...] = ()
        if message is not None and way is not None:
            sent[way].append(message)
            if len(sent[way]) > window:
                due = (sent[way][-1 - window],)
        received.append(due)
    actions = ranks[rank]
    return Plan(actions, _incoming(ranks, rank, traffic), tuple(received), (False,) * len(actions))


def _outgoing(actions: Iterable[Action], traffic: Traffic) -> Iterator[tuple[Message | None, Channel | None]]:
    """(message, its channel if it leaves the rank) of each action."""
    for action in actions:
        message = traffic.made(action)
        yield message, None if message is None else traffic.channel(message)


def _incoming(
    ranks: Sequence[Sequence[Action]], rank: int, traffic: Traffic
) -> dict[Channel, tuple[Message, ...]]:
    found: dict[Channel, list[Message]] = defaultdict(list)
    for actions in ranks:
        for message, way in _outgoing(actions, traffic):
            if message is not None and way is not None and way.target == rank:
                found[way].append(message)
    return {way: tuple(messages) for way, messages in found.items()}


def _received(
    ranks: Sequence[Sequence[Action]], rank: int, traffic: Traffic
) -> tuple[tuple[Message, ...], ...]:
    """A message from another rank shows how far that rank has come: what it needed until then has arrived there."""
    used, made = {}, {}
    for other, actions in enumerate(ranks):
        for place, action in enumerate(actions):
            used[traffic.needed(action)] = other, place
            made[traffic.made(action)] = other, place
    waiting: list[Message] = []
    received = []
    for action in ranks[rank]:
        needed = traffic.needed(action)
        done: list[Message] = []
        if needed is not None and traffic.channel(needed) is not None:
            source, progress = made[needed]
            done = [one for one in waiting if used[one][0] == source and used[one][1] <= progress]
            waiting = [one for one in waiting if one not in done]
        received.append(tuple(done))
        message = traffic.made(action)
        if message is not None and traffic.channel(message) is not None:
            waiting.append(message)
    return tuple(received)


def _is_last(actions: Sequence[Action]) -> tuple[bool, ...]:
    last = {action.stage: place for place, action in enumerate(actions) if action.kind in ("B", "I")}
    ends = set(last.values())
    return tuple(place in ends for place in range(len(actions)))
