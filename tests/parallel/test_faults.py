"""Whole runs of two ranks, on one node or two, that are hurt in every phase and still end with the same numbers.

MEGATUNE_INJECTIONS: how many deaths (default 10, one round through the phases).
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
INJECTIONS = int(os.environ.get("MEGATUNE_INJECTIONS", "10"))
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
        nodes = 1 + number % 2
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
