"""Pipeline schedules: what each rank does, in which order. Pure Python, no processes, no tensors.

| name | source | stages a rank holds |
| --- | --- | --- |
| gpipe | arXiv:1811.06965 | 1 |
| 1f1b | PipeDream-Flush, arXiv:2006.09503 | 1 |
| interleaved | Megatron-LM, arXiv:2104.04473 | 2 or more, in a loop |
| zb-h1 | zero bubble, arXiv:2401.10241 | 1 |
| zbv | zero bubble on a V, arXiv:2401.10241 section 6 | 2, in a V |

Idle time of a rank with m micro-batches, where forward, input gradient and weight gradient of all that a rank holds
take F, I and W: gpipe and 1f1b (pp - 1)(F + I + W); interleaved that divided by the stages of a rank; zb-h1
(pp - 1)(F + I - W) with as much memory as 1f1b; zbv about half of zb-h1's where F = I = W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Kind = Literal["F", "B", "I", "W"]


@dataclass(frozen=True, slots=True)
class Action:
    """`kind` of work of stage number `stage` on micro-batch `micro_batch`: F forward, B backward, or the halves of a
    backward: I for the gradient of the stage's input, W for those of its weights."""

    kind: Kind
    stage: int
    micro_batch: int

    def __repr__(self) -> str:
        return f"{self.kind}{self.stage}.{self.micro_batch}"


def held(schedule: str, pp: int, rank: int, virtual: int) -> tuple[int, ...]:
    """Numbers of the stages that pipeline rank `rank` holds, ascending. zbv goes down the ranks and back up, the others
    round and round."""
    if schedule == "zbv":
        return rank, 2 * pp - 1 - rank
    return tuple(range(rank, pp * virtual, pp))


def owners(schedule: str, pp: int, virtual: int) -> list[int]:
    """The pipeline rank of each stage."""
    found = {number: rank for rank in range(pp) for number in held(schedule, pp, rank, virtual)}
    return [found[number] for number in sorted(found)]


@lru_cache(maxsize=16)
def schedule(name: str, pp: int, virtual: int, micro_batches: int) -> tuple[tuple[Action, ...], ...]:
    """The actions of each rank, in order; every rank that waits for what it needs gets through.

    `virtual`: stages a rank (zbv: 2; 1 for all but interleaved). Interleaved needs a multiple of `pp` micro-batches;
    for the others any number will do.
    """
    ranks = range(pp)
    if name == "zbv":
        return tuple(tuple(_merged(_zbv(pp, rank, micro_batches))) for rank in ranks)
    if name == "zb-h1":
        return tuple(tuple(_merged(_zb_h1(pp, rank, micro_batches))) for rank in ranks)
    if name == "interleaved":
        return tuple(tuple(_interleaved(pp, rank, virtual, micro_batches)) for rank in ranks)
    warm_up = {"gpipe": lambda _: micro_batches, "1f1b": lambda rank: pp - 1 - rank}[name]
    return tuple(tuple(_alternating(rank, warm_up(rank), micro_batches)) for rank in ranks)


def forward_only(stages: Sequence[int], pp: int, micro_batches: int) -> Iterator[Action]:
    """Actions of a rank that holds `stages`, for evaluation: groups of `pp` micro-batches stage after stage."""
    for start in range(0, micro_batches, pp):
        for stage in stages:
            for micro_batch in range(start, min(start + pp, micro_batches)):
                yield Action("F", stage, micro_batch)


def _alternating(stage: int, warm_up: int, micro_batches: int) -> Iterator[Action]:
    """`warm_up` forwards ahead, then a forward and a backward in turn, then the rest of the backwards."""
    for step in range(micro_batches + warm_up):
        if step < micro_batches:
            yield Action("F", stage, step)
        if 0 <= step - warm_up < micro_batches:
            yield Action("B", stage, step - warm_up)


def _interleaved(pp: int, rank: int, virtual: int, micro_batches: int) -> Iterator[Action]:
    """1F1B over `virtual` stages: groups of pp micro-batches pass a rank's stages one after the other."""
    total = micro_batches * virtual

    def nth(n: int, kind: Kind) -> Action:
        group, place = divmod(n, pp * virtual)
        turn, offset = divmod(place, pp)
        turn = turn if kind == "F" else virtual - 1 - turn
        return Action(kind, turn * pp + rank, group * pp + offset)

    # A micro-batch needs (virtual - 1) * pp turns until it is in this rank's last stage, and the backward of the last
    # rank comes back after 2 turns for each rank between.
    warm_up = min(total, (virtual - 1) * pp + 2 * (pp - 1 - rank))
    for n in range(total + warm_up):
        if n < total:
            yield nth(n, "F")
        if n >= warm_up:
            yield nth(n - warm_up, "B")


def _zb_h1(pp: int, rank: int, micro_batches: int) -> Iterator[Action]:
    """1F1B in which rank r puts weight gradients off by r micro-batches: what later ranks save in warm-up, so that
    each holds up to pp micro-batches, and has them to do while the last input gradients go up the ranks."""
    ahead = pp - 1 - rank
    for step in range(micro_batches + ahead):
        if step < micro_batches:
            yield Action("F", rank, step)
        done = step - ahead
        if done >= 0:
            yield Action("I", rank, done)
            if done >= rank:
                yield Action("W", rank, done - rank)
    for left in range(max(0, micro_batches - rank), micro_batches):
        yield Action("W", rank, left)


def _zbv(pp: int, rank: int, micro_batches: int) -> Iterator[Action]:
    """Stages a on the way down and b on the way up, for equal times of F, I and W.

    A micro-batch is in b after 2 (pp - rank) - 1 turns. Until then the rank has room for forwards of a; then for
    `rank` rounds forwards of both; then b is at work while the first gradients of a are on their way; from then on the
    rank does every kind of work in each round. At the end, input gradients come first and the weight gradients that
    they leave fill the gaps. Written for at least 2 pp - 1 micro-batches; with fewer, those that are not there are left
    out.
    """
    a, b = held("zbv", pp, rank, 2)
    rounds = max(micro_batches, 2 * pp - 1)
    count = dict.fromkeys([("F", a), ("F", b), ("I", a), ("I", b), ("W", a), ("W", b)], 0)

    def do(kinds: str, stage: int) -> Iterator[Action]:
        for kind in kinds:
            number = count[kind, stage]
            count[kind, stage] += 1
            if number < micro_batches:
                yield Action(kind, stage, number)

    for _ in range(2 * (pp - rank) - 1):
        yield from do("F", a)
    for _ in range(rank):
        yield from do("F", b)
        yield from do("F", a)
    for _ in range(pp - rank):
        yield from do("F", b)
        yield from do("IW", b)
    while count["F", b] < rounds:
        if count["F", a] < rounds:
            yield from do("F", a)
        yield from do("IW", a)
        yield from do("F", b)
        yield from do("IW", b)
    for _ in range(rank):
        yield from do("I", a)
        yield from do("I", b)
    while count["I", a] < rounds:
        yield from do("IW", a)
    for stage in (b, a):
        while count["W", stage] < rounds:
            yield from do("W", stage)


def _merged(actions: Iterator[Action]) -> Iterator[Action]:
    """The first stage's I and W in one where they follow each other: nobody waits for its input gradient, and a whole
    backward is cheaper."""
    last: Action | None = None
    for action in actions:
        if last is not None:
            if action == Action("W", 0, last.micro_batch):
                yield Action("B", 0, last.micro_batch)
                last = None
                continue
            yield last
        last = action if action.kind == "I" and action.stage == 0 else None
        if last is None:
            yield action
    if last is not None:
        yield last


@dataclass(frozen=True)
class Timeline:
    """A schedule played through. `total`: time of a step. `busy`: time that each rank works. `peak`: the most
    (stage, micro-batch) pairs whose activations each rank holds at a time, from forward to the end of backward."""

    total: float
    busy: tuple[float, ...]
    peak: tuple[int, ...]

    @property
    def bubble(self) -> float:
        """Share of the ranks' time that is idle."""
        return 1.0 - sum(self.busy) / (len(self.busy) * self.total)


def play(
    ranks: Sequence[Sequence[Action]], cost: Callable[[Action], float], transfer: float = 0.0
) -> Timeline:
    """Every rank does its actions in order, each as soon as what it needs is there; `transfer`: time between ranks.

    Raises ValueError where that comes to a stop.
    """
    owner = {action.stage: rank for rank, actions in enumerate(ranks) for action in actions}
    last = max(owner)
    done: dict[tuple[str, int, int], float] = {}
    clock, place = [0.0] * len(ranks), [0] * len(ranks)
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(ranks):
            while place[rank] < len(actions):
                action = actions[place[rank]]
                needs = [key for key in needed(action, last) if key is not None]
                if any(key not in done for key in needs):
                    break
                ready = (done[key] + (transfer if owner[key[1]] != rank else 0.0) for key in needs)
                clock[rank] = max(clock[rank], *ready, 0.0) + cost(action)
                kind = "I" if action.kind == "B" else action.kind
                done[kind, action.stage, action.micro_batch] = clock[rank]
                place[rank] += 1
                moved = True
    stuck = [actions[at] for actions, at in zip(ranks, place, strict=True) if at < len(actions)]
    if stuck:
        raise ValueError(f"the schedule comes to a stop before {stuck}")
    busy = tuple(sum(map(cost, actions)) for actions in ranks)
    return Timeline(max(clock), busy, tuple(_peak(actions) for actions in ranks))


def needed(action: Action, last: int) -> Iterator[tuple[str, int, int]]:
    """What must be done before: (F, I or W, stage, micro-batch)."""
    kind, stage, micro_batch = action.kind, action.stage, action.micro_batch
    if kind == "F":
        if stage > 0:
            yield "F", stage - 1, micro_batch
    elif kind == "W":
        yield "I", stage, micro_batch
    else:
        yield "F", stage, micro_batch
        if stage < last:
            yield "I", stage + 1, micro_batch


def _peak(actions: Sequence[Action]) -> int:
    change: Mapping[Kind, int] = {"F": 1, "B": -1, "W": -1, "I": 0}
    level = most = 0
    for action in actions:
        level += change[action.kind]
        most = max(most, level)
    return most
