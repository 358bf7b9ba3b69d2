"""Pipeline schedules, the cut into stages, and what they refuse: all without processes."""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise

import pytest

from megatune.config.schema import ParallelConfig
from megatune.errors import ParallelError
from megatune.parallel.pipeline import (
    Action,
    balance,
    check_micro_batches,
    check_schedule,
    held,
    play,
    schedule,
    stages_of,
    virtual_of,
)
from megatune.parallel.pipeline.p2p import colour
from megatune.parallel.pipeline.plan import (
    Channel,
    Message,
    Plan,
    Traffic,
    evaluation_plan,
    training_plan,
)
from megatune.parallel.pipeline.schedules import owners

VIRTUAL = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb-h1": 1, "zbv": 2}
CASES = [
    (name, pp, virtual, micro_batches)
    for name in VIRTUAL
    for pp in (2, 3, 4, 8)
    for virtual in ((2, 3) if name == "interleaved" else (VIRTUAL[name],))
    for micro_batches in (1, 2, 3, pp, 2 * pp, 3 * pp + 1, 4 * pp)
    if name != "interleaved" or micro_batches % pp == 0
]


def unit(action: Action) -> float:
    """Time of an action where forward and each half of backward of a stage take 1."""
    return 2.0 if action.kind == "B" else 1.0


def idle(name: str, pp: int, micro_batches: int, virtual: int | None = None) -> float:
    """Time that the longest-waiting rank does nothing, in units of a forward of all that a rank holds."""
    virtual = virtual or VIRTUAL[name]
    played = play(schedule(name, pp, virtual, micro_batches), unit)
    return (played.total - min(played.busy)) / virtual


@pytest.mark.parametrize(("name", "pp", "virtual", "micro_batches"), CASES)
def test_every_action_once_in_a_possible_order(name: str, pp: int, virtual: int, micro_batches: int) -> None:
    ranks = schedule(name, pp, virtual, micro_batches)
    play(ranks, unit)  # raises where a rank would wait for ever
    for rank, actions in enumerate(ranks):
        stages = held(name, pp, rank, virtual)
        pairs = {(stage, number) for stage in stages for number in range(micro_batches)}
        by_kind = {
            kind: [(one.stage, one.micro_batch) for one in actions if one.kind == kind] for kind in "FBIW"
        }
        assert len(set(actions)) == len(actions)
        assert set(by_kind["F"]) == pairs
        assert set(by_kind["I"]) == set(by_kind["W"])
        assert sorted(by_kind["B"] + by_kind["I"]) == sorted(pairs)
        if not name.startswith("zb"):
            assert not by_kind["I"]
        for stage in stages:
            # Whole backwards or halves, and each kind in the order of the micro-batches.
            kinds = [{one.kind for one in actions if one.stage == stage}]
            assert kinds[0] in ({"F", "B"}, {"F", "I", "W"})
            for found in by_kind.values():
                numbers = [number for where, number in found if where == stage]
                assert numbers == sorted(numbers)


def test_a_schedule_that_stops_is_found() -> None:
    waits = [(Action("B", 0, 0), Action("F", 0, 0)), (Action("F", 1, 0), Action("B", 1, 0))]
    with pytest.raises(ValueError, match="comes to a stop before"):
        play(waits, unit)


@pytest.mark.parametrize("pp", [2, 3, 4, 8])
def test_idle_time(pp: int) -> None:
    m = 4 * pp
    assert idle("gpipe", pp, m) == idle("1f1b", pp, m) == 3 * (pp - 1)
    assert idle("interleaved", pp, m, 2) == 3 * (pp - 1) / 2
    assert idle("interleaved", pp, m, 3) == 3 * (pp - 1) / 3
    assert idle("zb-h1", pp, m) == pp - 1
    assert idle("zbv", pp, m) == (pp - 1) / 2
    bubbles = {name: play(schedule(name, pp, VIRTUAL[name], m), unit).bubble for name in VIRTUAL}
    assert bubbles["zbv"] < bubbles["zb-h1"] < bubbles["1f1b"]
    assert bubbles["interleaved"] < bubbles["1f1b"]


@pytest.mark.parametrize("pp", [2, 4, 8])
def test_activations_held(pp: int) -> None:
    m = 4 * pp
    peaks = {name: play(schedule(name, pp, VIRTUAL[name], m), unit).peak for name in VIRTUAL}
    assert peaks["gpipe"] == (m,) * pp
    assert peaks["1f1b"] == tuple(pp - rank for rank in range(pp))
    assert peaks["zb-h1"] == (pp,) * pp
    assert max(peaks["zbv"]) <= 2 * pp
    assert peaks["interleaved"] == tuple(pp + 2 * (pp - 1 - rank) + 1 for rank in range(pp))


def test_transfers_and_costs_count() -> None:
    ranks = schedule("1f1b", 2, 1, 1)
    assert play(ranks, unit).total == 6
    assert play(ranks, unit, transfer=0.5).total == 7
    assert play(ranks, lambda action: 2 * unit(action)).busy == (6, 6)


@pytest.mark.parametrize(("name", "pp", "virtual", "micro_batches"), CASES)
@pytest.mark.parametrize("trained_from", [0, 1])
def test_messages_fit(name: str, pp: int, virtual: int, micro_batches: int, trained_from: int) -> None:
    count = pp * virtual
    wanted = tuple(stage > trained_from for stage in range(count))
    traffic = Traffic(tuple(owners(name, pp, virtual)), wanted)
    plans = [training_plan(name, pp, virtual, rank, wanted, micro_batches) for rank in range(pp)]
    check_plans(plans, traffic, surely=True)
    for plan in plans:
        flags = [
            (one.stage, one.micro_batch) for one, last in zip(plan.actions, plan.is_last, strict=True) if last
        ]
        assert sorted(flags) == sorted({(one.stage, micro_batches - 1) for one in plan.actions})
    nothing = Traffic(traffic.owner, (False,) * count)
    plans = [evaluation_plan(name, pp, virtual, rank, micro_batches) for rank in range(pp)]
    check_plans(plans, nothing, surely=False)
    for plan in plans:
        assert most_sent(plan, nothing) <= pp * virtual * 2 + 1


def check_plans(plans: list[Plan], traffic: Traffic, *, surely: bool) -> None:
    """Plays the plans with sends that are waited for where the plan says so: nobody stops, all arrives in the order in
    which it was sent. `surely`: what is waited for has been received already."""
    place, sent, taken = [0] * len(plans), {}, set()
    moved = True
    while moved:
        moved = False
        for rank, plan in enumerate(plans):
            while place[rank] < len(plan.actions):
                action = plan.actions[place[rank]]
                needed = traffic.needed(action)
                if needed is not None and needed not in sent:
                    break
                if any(message not in taken for message in plan.received[place[rank]]):
                    assert not surely
                    break
                if needed is not None:
                    taken.add(needed)
                made = traffic.made(action)
                if made is not None:
                    sent[made] = len(sent)
                place[rank] += 1
                moved = True
    assert [len(plan.actions) for plan in plans] == place
    assert taken == set(sent)
    for rank, plan in enumerate(plans):
        for channel, messages in plan.incoming.items():
            assert channel.target == rank
            assert [sent[one] for one in messages] == sorted(sent[one] for one in messages)
        arrived = {one for messages in plan.incoming.values() for one in messages}
        needed = {traffic.needed(action) for action in plan.actions} - {None}
        assert arrived == {one for one in needed if traffic.channel(one) is not None}


def most_sent(plan: Plan, traffic: Traffic) -> int:
    """The most messages on their way from a rank."""
    level = most = 0
    for action, received in zip(plan.actions, plan.received, strict=True):
        made = traffic.made(action)
        level += (made is not None and traffic.channel(made) is not None) - len(received)
        most = max(most, level)
    return most


def test_sent_tensors_are_let_go_early() -> None:
    wanted = (False, True, True, True)
    plan = training_plan("1f1b", 4, 1, 1, wanted, 64)
    assert most_sent(plan, Traffic((0, 1, 2, 3), wanted)) <= 8
    evaluation = evaluation_plan("1f1b", 4, 1, 1, 64)
    assert most_sent(evaluation, Traffic((0, 1, 2, 3), (False,) * 4)) <= 5


def test_a_frozen_beginning_sends_no_gradients() -> None:
    wanted = (False, False, False, True)
    plan = training_plan("1f1b", 4, 1, 1, wanted, 8)
    assert list(plan.incoming) == [Channel(0, 1, "F")]
    assert Traffic((0, 1, 2, 3), wanted).made(Action("B", 3, 0)) == Message("B", 3, 0)


@pytest.mark.parametrize("name", list(VIRTUAL))
@pytest.mark.parametrize("pp", [2, 3, 4, 7])
def test_channels_of_a_group_share_no_rank(name: str, pp: int) -> None:
    owner = tuple(owners(name, pp, VIRTUAL[name]))
    channels = Traffic(owner, (True,) * len(owner)).channels()
    lanes = colour(channels)
    for lane in set(lanes.values()):
        ends = [rank for one in channels if lanes[one] == lane for rank in (one.source, one.target)]
        assert len(ends) == len(set(ends))
    assert max(lanes.values()) < (9 if name == "zbv" else 6)


def test_placement() -> None:
    assert held("1f1b", 4, 2, 1) == (2,)
    assert held("interleaved", 4, 1, 3) == (1, 5, 9)
    assert [held("zbv", 3, rank, 2) for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]


# The cut into stages.


def dearest(counts: list[int], costs: list[float], first: float, last: float) -> tuple[float, float]:
    """(cost of the dearest stage, sum of the squares)."""
    stages, start = [], 0
    for count in counts:
        stages.append(sum(costs[start : start + count]))
        start += count
    stages[0] += first
    stages[-1] += last
    return max(stages), sum(cost * cost for cost in stages)


@pytest.mark.parametrize(
    ("costs", "first", "last", "stages"),
    [
        ([1.0] * 8, 0.1, 1.5, 4),
        ([1.0, 1.0, 3.0, 1.0, 2.0, 2.0, 1.0], 0.5, 2.5, 3),
        ([1.0] * 5, 0.0, 4.0, 4),
        ([5.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2.0, 0.0, 4),
        ([1.0] * 7, 0.3, 0.7, 1),
    ],
)
def test_balance_is_the_best_of_all(costs: list[float], first: float, last: float, stages: int) -> None:
    cuts = combinations_with_replacement(range(len(costs) + 1), stages - 1)
    borders = [(0, *inner, len(costs)) for inner in cuts]
    ways = [[b - a for a, b in pairwise(one)] for one in borders]
    best = min(dearest(way, costs, first, last) for way in ways if all(way))
    found = balance(costs, first, last, stages)
    assert sum(found) == len(costs) and all(found)
    assert dearest(found, costs, first, last) == pytest.approx(best)


def test_balance_counts_embedding_and_head() -> None:
    assert balance([1.0] * 8, 0.0, 0.0, 4) == [2, 2, 2, 2]
    *others, last = balance([1.0] * 8, 0.0, 2.0, 4)
    assert sorted(others) == [2, 2, 3] and last == 1
    assert balance([1.0] * 8, 1.0, 1.0, 2) == [4, 4]
    assert balance([1.0] * 10, 2.0, 0.0, 4)[0] == 1
    assert balance([1.0] * 2, 0.1, 0.5, 4) == [0, 1, 1, 0]  # too few layers for all
    assert balance([1.0] * 4, 0.0, 9.0, 4) == [1, 1, 1, 1]


def test_stages_of() -> None:
    costs = ([1.0] * 6, 0.1, 0.5)
    layers = [list(stage.layers) for stage in stages_of(ParallelConfig(pipeline=2, zero=0), *costs)]
    assert layers == [[0, 1, 2], [3, 4, 5]]
    config = ParallelConfig(pipeline=2, zero=0, schedule="zbv", stages=[0, 4, 0, 2])
    stages = stages_of(config, *costs)
    assert [list(stage.layers) for stage in stages] == [[], [0, 1, 2, 3], [], [4, 5]]
    assert [stage.number for stage in stages] == [0, 1, 2, 3] and {stage.count for stage in stages} == {4}
    assert [list(stage.layers) for stage in stages_of(ParallelConfig(), *costs)] == [[0, 1, 2, 3, 4, 5]]
    with pytest.raises(ParallelError, match=r"has 3 entries.*2 x virtual 2 are 4 stages; give 4"):
        stages_of(ParallelConfig(pipeline=2, zero=0, schedule="zbv", stages=[2, 2, 2]), *costs)
    with pytest.raises(
        ParallelError, match=r"add up to 7 layers, but the model has 6; make them add up to 6"
    ):
        stages_of(ParallelConfig(pipeline=2, stages=[4, 3]), *costs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "gpipe"}, "parallel.schedule: gpipe does nothing without a pipeline"),
        ({"virtual": 2}, "parallel.virtual: 2 does nothing without a pipeline"),
        ({"stages": [6]}, r"parallel.stages: \[6\] does nothing without a pipeline"),
        (
            {"pipeline": 2, "virtual": 2},
            "1f1b each rank holds 1 stage, not 2; use 1, or schedule interleaved",
        ),
        ({"pipeline": 2, "virtual": 2, "schedule": "gpipe"}, "gpipe each rank holds 1 stage, not 2"),
        ({"pipeline": 2, "virtual": 3, "schedule": "zb-h1", "zero": 1}, "zb-h1 each rank holds 1 stage"),
        ({"pipeline": 2, "virtual": 3, "schedule": "zbv", "zero": 1}, "2 stages, not 3; use 2"),
        ({"pipeline": 2, "virtual": 1, "schedule": "zbv", "zero": 1}, "2 stages, not 1; use 2"),
        ({"pipeline": 2, "virtual": 1, "schedule": "interleaved"}, "2 stages or more, not 1; use 2"),
        ({"pipeline": 2, "schedule": "zb-h1"}, "zb-h1 computes .* set parallel.zero to 2 or less"),
        ({"pipeline": 2, "schedule": "zbv", "zero": 3}, "zbv computes .* set parallel.zero to 2 or less"),
    ],
)
def test_refused(options: dict, message: str) -> None:
    config = ParallelConfig(**options)
    with pytest.raises(ParallelError, match=message):
        check_schedule(config)
    with pytest.raises(ParallelError, match=message):
        stages_of(config, [1.0] * 6, 0.0, 0.0)


@pytest.mark.parametrize(
    ("options", "virtual"),
    [
        ({}, 1),
        ({"virtual": 1}, 1),
        ({"pipeline": 2}, 1),
        ({"pipeline": 2, "schedule": "gpipe", "virtual": 1}, 1),
        ({"pipeline": 2, "schedule": "zb-h1", "zero": 2}, 1),
        ({"pipeline": 2, "schedule": "interleaved"}, 2),
        ({"pipeline": 2, "schedule": "interleaved", "virtual": 3}, 3),
        ({"pipeline": 2, "schedule": "zbv", "zero": 0}, 2),
        ({"pipeline": 2, "schedule": "zbv", "virtual": 2, "zero": 0}, 2),
    ],
)
def test_allowed(options: dict, virtual: int) -> None:
    config = ParallelConfig(**options)
    check_schedule(config)
    assert virtual_of(config) == virtual


def test_micro_batches_of_interleaved() -> None:
    config = ParallelConfig(pipeline=4, schedule="interleaved")
    check_micro_batches(config, 8, 2)
    with pytest.raises(
        ParallelError, match=r"global_batch_size: 12 sequences are 6 micro-batches of 2.*use 8 or 16"
    ):
        check_micro_batches(config, 6, 2)
    with pytest.raises(ParallelError, match=r"multiple of parallel.pipeline: 4 micro-batches; use 12$"):
        check_micro_batches(config, 2, 3)
    for name in ("gpipe", "1f1b", "zb-h1", "zbv"):
        check_micro_batches(ParallelConfig(pipeline=4, schedule=name, zero=0), 3, 2)
