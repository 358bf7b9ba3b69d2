"""Five optimizer steps under every layout equal those of one process: losses, gradient norms, final weights.

fp32 on the CPU over gloo. Tolerances, relative: losses 1e-5, gradient norms 2e-5, final weights 1e-5 (norm of the
difference over norm of the tensor), with sums in other orders the only reason to differ.
"""

from __future__ import annotations

import gc
from functools import cache

import pytest
import torch

from tests.helpers.dist import run_ranks
from tests.helpers.layouts import Run, layouts_of, runs_of
from tests.helpers.parity import FAMILIES, Case, Outcome, train

LOSS, NORM, WEIGHT = 1e-5, 2e-5, 1e-5
CASES = [
    pytest.param(
        run,
        # The cases of one family and number of processes share their processes: the first takes the time of all.
        marks=pytest.mark.timeout(1200),
        id=run.id,
    )
    for family in FAMILIES
    for run in runs_of(family)
]


def _run_all(rank: int, world_size: int, cases: dict[str, Case]) -> dict[str, Outcome | str]:
    """Every case in one set of processes; those of one layout, which follow each other, share process groups."""
    from megatune import parallel
    from tests.helpers.parity import config_of

    world, section, found = None, None, {}
    for name, case in cases.items():
        if case.parallel != section:
            if world is not None:
                world.close()
                world = None
                gc.collect()  # every group has three threads, one of which looks about a hundred times a second
                gc.freeze()  # what is left are modules: the next look need not go through them again
            world, section = parallel.init(config_of(case).parallel, device="cpu"), case.parallel
        found[name] = train(case, world=world)
    return found


@cache
def alone(family: str, method: str, layers: int) -> Outcome:
    (found,) = run_ranks(_run_all, 1, {"one": Case(family, method, layers=layers)})
    return found["one"]


@cache
def under(family: str, processes: int) -> list[dict[str, Outcome]]:
    """Outcomes of all layouts of a family with that many processes, by rank."""
    cases = {
        f"{run.layout}/{run.method}": Case(family, run.method, run.section, layers=run.layers)
        for run in runs_of(family)
        if run.processes == processes
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


@pytest.mark.parametrize("run", CASES)
def test_layout_equals_one_process(run: Run) -> None:
    found = [outcomes[f"{run.layout}/{run.method}"] for outcomes in under(run.family, run.processes)]
    compare(alone(run.family, run.method, run.layers), found)


def _without_partial_sums(zero, chosen) -> None:
    """Leave parameters that `chosen` names with each tensor parallel process's own part of their gradient."""
    complete = zero.Zero._sum_partial

    def some(self) -> None:
        kept = {name: master.grad.clone() for name, master in self._masters.items() if chosen(name)}
        complete(self)
        for name, grad in kept.items():
            self._masters[name].grad.copy_(grad)

    zero.Zero._sum_partial = some


def _break(what: str) -> None:
    """Drop one reduction of gradients, in this process."""
    from megatune.parallel import buckets, collectives, linear, zero

    def own_rows(x, axis, *, async_op=False):
        rows = x.shape[0] // axis.size
        return x.narrow(0, axis.rank * rows, rows).clone(), None

    if what == "tensor: inputs of column layers":
        linear.scatter_sum_rows = own_rows
    elif what == "sequence: norms":
        _without_partial_sums(zero, lambda name: name.endswith("attn_norm.weight"))
    elif what == "lora: A of column layers":
        _without_partial_sums(zero, lambda name: name.endswith("qkv.adapter.lora_a"))
    elif what == "lora: B of row layers":
        _without_partial_sums(zero, lambda name: name.endswith("down.adapter.lora_b"))
    elif what == "context: all weights":

        def kept(out, x, *, group, async_op=False):
            rank = torch.distributed.get_rank(group)
            out.copy_(x.view(-1, *out.shape)[rank].view_as(out))

        buckets.reduce_scatter = kept
    elif what == "expert: tokens on their way back":
        collectives._AllToAll.backward = staticmethod(
            lambda ctx, grad: (grad.new_zeros(sum(ctx.send), *grad.shape[1:]), None, None, None)
        )
    elif what == "pipeline: tied embeddings":
        zero.Zero._sum_tied = lambda self: None
    else:
        raise AssertionError(what)


def _run_broken(rank: int, world_size: int, what: str, case: Case) -> Outcome:
    _break(what)
    return train(case)


@pytest.mark.parametrize(
    ("what", "family", "layout", "method"),
    [
        ("tensor: inputs of column layers", "dense", "tp2", "full"),
        ("sequence: norms", "dense", "tp2", "full"),
        ("lora: A of column layers", "dense", "tp2", "lora"),
        ("lora: B of row layers", "dense", "tp2", "lora"),
        ("context: all weights", "dense", "cp2", "full"),
        ("expert: tokens on their way back", "moe", "ep2", "full"),
        ("pipeline: tied embeddings", "dense-tied", "pp2", "full"),
    ],
)
def test_one_missing_reduction_is_seen(what: str, family: str, layout: str, method: str) -> None:
    processes, section = layouts_of(family)[layout]
    run = Run(family, layout, method, processes, section)
    broken = run_ranks(_run_broken, processes, what, Case(family, method, section, layers=run.layers))
    with pytest.raises(AssertionError):
        compare(alone(family, method, run.layers), broken)


def _left_over(rank: int, world_size: int) -> int:
    """Modules that are alive after three runs in one process."""
    from megatune import parallel
    from tests.helpers.parity import config_of

    for section in ({"zero": 3}, {"tensor": 2}, {"pipeline": 2}):
        case = Case("dense", "lora", section)
        world = parallel.init(config_of(case).parallel, device="cpu")
        train(case, world=world)
        world.close()
    gc.collect()
    return sum(isinstance(thing, torch.nn.Module) for thing in gc.get_objects())


def test_nothing_of_a_run_stays_behind() -> None:
    assert run_ranks(_left_over, 2) == [0, 0]
