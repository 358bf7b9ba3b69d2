"""Five optimizer steps under every layout equal those of one process: losses, gradient norms, final weights.

fp32 on the CPU over gloo. Tolerances, relative: losses 1e-5, gradient norms 2e-5, final weights 1e-5 (norm of the
difference over norm of the tensor), with sums in other orders the only reason to differ.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.helpers.dist import run_ranks
from tests.helpers.layouts import layouts_of
from tests.helpers.parity import FAMILIES, METHODS, Case, Outcome, train

LOSS, NORM, WEIGHT = 1e-5, 2e-5, 1e-5
CASES = [
    pytest.param(
        family,
        layout,
        method,
        # The cases of one family and number of processes are run together, by one worker.
        marks=[pytest.mark.xdist_group(f"parity-{family}-{processes}"), pytest.mark.timeout(1200)],
        id=f"{family}-{layout}-{method}",
    )
    for family in FAMILIES
    for layout, (processes, _) in layouts_of(family).items()
    for method in METHODS
]


def _run_all(rank: int, world_size: int, cases: dict[str, Case]) -> dict[str, Outcome | str]:
    """Every case in one set of processes; worlds, and with them process groups, are made once a layout."""
    from megatune import parallel
    from tests.helpers.parity import config_of

    worlds, found = {}, {}
    for name, case in cases.items():
        key = str(sorted(case.parallel.items()))
        if key not in worlds:
            worlds[key] = parallel.init(config_of(case).parallel, device="cpu")
        found[name] = train(case, world=worlds[key])
    return found


@cache
def alone(family: str, method: str) -> Outcome:
    (found,) = run_ranks(_run_all, 1, {"one": Case(family, method)})
    return found["one"]


@cache
def under(family: str, processes: int) -> list[dict[str, Outcome]]:
    """Outcomes of all layouts of a family with that many processes, by rank."""
    cases = {
        f"{layout}/{method}": Case(family, method, section)
        for layout, (size, section) in layouts_of(family).items()
        if size == processes
        for method in METHODS
    }
    return run_ranks(_run_all, processes, cases, timeout=900)


def compare(expected: Outcome, found: list[Outcome]) -> None:
    """Raise AssertionError where a run differs from the one of one process."""
    for outcome in found:
        assert outcome.losses == pytest.approx(expected.losses, rel=LOSS)
        assert outcome.norms == pytest.approx(expected.norms, rel=NORM)
    weights, truth = found[0].weights(found[1:]), expected.weights()
    assert weights.keys() == truth.keys()
    for name, tensor in truth.items():
        error = torch.linalg.vector_norm(weights[name] - tensor) / torch.linalg.vector_norm(tensor)
        assert error <= WEIGHT, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize(("family", "layout", "method"), CASES)
def test_layout_equals_one_process(family: str, layout: str, method: str) -> None:
    processes, _ = layouts_of(family)[layout]
    compare(alone(family, method), [found[f"{layout}/{method}"] for found in under(family, processes)])
