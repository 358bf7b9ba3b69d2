"""Whole runs of two ranks, on one node or two, that are hurt in every phase and still end with the same numbers.

MEGATUNE_INJECTIONS: how many deaths (default 8, one round through the phases); MEGATUNE_SEED: which.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatune.config.loader import dump_config
from tests.helpers.faults import Fault, Outcome, Request, Zygote, faults
from tests.helpers.runs import metrics, tensors, tiny_config

STEPS, SAVE_EVERY, EVAL_EVERY = 8, 2, 3
INJECTIONS = int(os.environ.get("MEGATUNE_INJECTIONS", "8"))
SEED = int(os.environ.get("MEGATUNE_SEED", "5"))
LAYOUTS = {1: 2, 2: 1}  # nodes: ranks a node


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    found = Zygote()
    yield found
    found.close()


@pytest.fixture(scope="module")
def job(zygote, tiny_llama, tiny_data, tmp_path_factory):
    """Runs a job in a folder of its own; returns its outcome and the run's folder."""

    def run(nodes: int = 1, *injected: Fault, again: Path | None = None, **options: Any):
        folder = again or tmp_path_factory.mktemp("job")
        config = tiny_config(
            tiny_llama,
            tiny_data,
            folder / "run",
            train__steps=STEPS,
            train__eval_every=EVAL_EVERY,
            data__seq_length=48,
            parallel={"zero": 1},
        )
        config.checkpoint.every = SAVE_EVERY
        path = folder / "config.yaml"
        path.write_text(dump_config(config))
        start = len(list(folder.glob("job-*")))
        request = Request(
            str(path), str(folder / f"job-{start}"), nodes, LAYOUTS.get(nodes, 1), injected, **options
        )
        return zygote.run(request), folder / "run"

    return run


@pytest.fixture(scope="module")
def whole(job):
    """What a run gives that nobody disturbs: numbers by step, weights."""
    outcome, folder = job()
    assert outcome.codes == [0], outcome.said
    return numbers(folder), tensors(folder / "model")


def numbers(folder: Path) -> list[tuple[Any, ...]]:
    return [
        (row["step"], row.get("loss"), row.get("grad_norm"), row.get("eval_loss")) for row in metrics(folder)
    ]


def check_whole(outcome: Outcome, folder: Path, whole: Any) -> None:
    """It ended well, nothing outlived it, no save was lost, and the numbers are the undisturbed run's, bit by bit."""
    assert set(outcome.codes) == {0}, outcome.said
    assert not outcome.alive
    for generation, ended in enumerate(saved_by_generation(outcome)[:-1], start=1):
        assert outcome.resumed(generation) >= ended, outcome.said
    assert numbers(folder) == whole[0]
    model = tensors(folder / "model")
    assert all((model[name] == tensor).all() for name, tensor in whole[1].items())


def saved_by_generation(outcome: Outcome) -> list[int]:
    """The newest checkpoint that any rank knew of when a start ended."""
    ended, nodes = outcome.of("ended"), len(outcome.codes)
    return [max(event["saved"] for event in ended[at : at + nodes]) for at in range(0, len(ended), nodes)]


def test_deaths_in_every_phase(job, whole) -> None:
    found: list[dict[str, Any]] = []
    for number, injected in enumerate(faults(SEED, INJECTIONS, 2, STEPS, SAVE_EVERY, EVAL_EVERY)):
        nodes = 1 + (number + number // 8) % 2  # each phase in turn on one node and on two
        outcome, folder = job(nodes, *injected)
        (fault,) = injected
        struck = outcome.of("fault")
        # One that was to come a little later may have come when the rank was done.
        assert len(struck) == 1 or fault.delay, fault
        check_whole(outcome, folder, whole)
        if not struck or len(outcome.of("rank started")) == 2:
            assert fault.delay, fault
            continue
        hurt, restarted = struck[0]["at"], outcome.of("rank started")[2]["at"]
        assert restarted - hurt < (10 if nodes == 1 else 20)
        assert f"rank {fault.rank} of 2" in outcome.said
        if not fault.delay and fault.phase not in ("start", "end"):
            assert f"step {fault.step}, {fault.phase}" in outcome.said
        after = [event["at"] for event in outcome.of("finished") if event["at"] > restarted]
        found.append(
            {
                "phase": fault.phase,
                "nodes": nodes,
                "restart_seconds": restarted - hurt,
                "step_seconds": after[0] - hurt if after else None,
            }
        )
    results = os.environ.get("MEGATUNE_RESULTS")
    if results:
        Path(results, "injections.json").write_text(json.dumps(found, indent=1))
    assert len(found) >= 0.7 * INJECTIONS


def test_hangs_are_found_and_shown(job, whole) -> None:
    """One rank that sleeps in a step, and one that is frozen: stacks in the logs, the run goes on."""
    sleeping = Fault(1, 3, "backward", "sleep", delay=600)
    frozen = Fault(0, 6, "forward", "stop")
    outcome, folder = job(1, sleeping, frozen, hang=2.0)
    check_whole(outcome, folder, whole)
    assert "rank 1 of 2" in outcome.said and "hangs in step 3, backward" in outcome.said
    assert "rank 0: in step 3, reduce since" in outcome.said  # what the other did meanwhile
    for rank in range(2):
        assert "most recent call first" in outcome.log(rank)
    assert "_hurt" in outcome.log(1), "its stack shows where it stood"
    assert "rank 0 of 2" in outcome.said and "hangs in step 6, forward" in outcome.said
    assert "most recent call first" in outcome.log(1, 1)
    assert len(outcome.of("rank started")) == 6


def test_what_is_slow_is_no_hang(job, whole) -> None:
    """Four places where a rank may take longer than within a step: first step, data, evaluation, saving."""
    slow = [
        Fault(0, 1, "forward", "sleep", delay=3),
        Fault(1, 3, "fetch", "sleep", delay=3),
        Fault(0, 3, "evaluate", "sleep", delay=3),
        Fault(1, 4, "save", "sleep", delay=3),
    ]
    outcome, folder = job(1, *slow, hang=2.0)
    check_whole(outcome, folder, whole)
    assert len(outcome.of("rank started")) == 2, outcome.said


def test_a_step_that_always_fails_stops_the_run(job) -> None:
    outcome, folder = job(2, Fault(1, 5, "reduce", "raise", always=True))
    assert outcome.codes == [77, 77], outcome.said
    assert not outcome.alive
    assert "failed with exit code 1 in step 5, reduce; the other 1 were ended" in outcome.said
    assert "RuntimeError: an error that was put there" in outcome.said
    assert "not started again: step 5 failed twice in a row" in outcome.said
    assert len(outcome.of("rank started")) == 4
    # Step 4's save runs beside step 5, which may end it; step 2's is whole.
    whole = {path.parent.name for path in folder.glob("checkpoints/step-*/manifest.json")}
    assert whole and whole <= {"step-000002", "step-000004"}


@pytest.mark.parametrize(
    ("nodes", "fault", "layout"),
    [
        (1, Fault(1, 3, "backward", "term agent"), ()),
        (2, Fault(1, 5, "forward", "term"), ()),  # only one rank of one node is told
        (1, Fault(0, 6, "evaluate", "term"), ()),
        (1, Fault(1, 3, "forward", "term"), ("parallel.pipeline=2",)),
    ],
    ids=["agent", "one rank", "evaluation", "pipeline"],
)
def test_a_stop_loses_no_finished_step(job, whole, nodes, fault, layout) -> None:
    outcome, folder = job(nodes, fault, overrides=layout)
    assert set(outcome.codes) == {75}, outcome.said
    assert not outcome.alive
    done = max(event["step"] for event in outcome.of("finished"))
    assert done == fault.step, "the step under way is the last one"
    assert (folder / "checkpoints" / f"step-{done:06d}" / "manifest.json").exists()
    assert json.loads((folder / "grace.json").read_text())["grace_seconds"] >= 15
    if fault.phase in ("backward", "evaluate"):
        outcome, _ = job(nodes, again=folder.parent)
        check_whole(outcome, folder, whole)


def test_a_stop_before_there_is_anything_to_save(job) -> None:
    outcome, _ = job(1, Fault(0, 0, "start", "term agent"))
    assert outcome.codes == [75], outcome.said
    assert not outcome.alive


@pytest.mark.parametrize("node", [0, 1])
def test_a_lost_node_ends_the_job_for_another_start(job, whole, node: int) -> None:
    """No rank outlives its agent, the other agent does not wait, and the next start loses nothing."""
    outcome, folder = job(2, kill_agent=node)
    assert outcome.codes[1 - node] == 76, outcome.said
    assert not outcome.alive, "ranks of the lost agent, too"
    (killed,) = outcome.of("agent killed")
    assert outcome.of("over")[0]["at"] - killed["at"] < 20
    lost = f"node {node}" if node else "node 0's agent"
    assert lost in outcome.said and "is lost" in outcome.said
    outcome, _ = job(2, again=folder.parent)
    check_whole(outcome, folder, whole)
