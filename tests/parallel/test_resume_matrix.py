"""A run saved under any layout goes on under any other.

Each layout trains three steps, saves, and trains three more. Then its checkpoint is loaded under every layout, and the
global state must be bit for bit the one that was saved. Three steps more are those of the run that was not interrupted:
losses, weights and moments bit for bit where only pipeline (of untied embeddings), recompute and ZeRO differ (any stage
where a process has one micro-batch a step; with more, between 0 and 1, which sum gradients over processes once a step,
or 2 and 3, which do in each micro-batch); else within 1e-5 (losses), 2e-5 (gradient norms) and 1e-5 (weights: norm of
the difference over that of the tensor).

Only neighbours in the lists below train on by default. MEGATUNE_RESUME=dense-full,moe-lora: every pair of these groups;
all: of all groups.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.dist import run_ranks
from tests.helpers.parity import FAMILIES, Case, Outcome, batches, config_of, fill

HALF, WHOLE = 3, 6
CHOSEN = os.environ.get("MEGATUNE_RESUME")
LOSS, NORM, WEIGHT = 1e-5, 2e-5, 1e-5
# The schedule moves, so that a step that is forgotten is seen; gradients are clipped in every step.
CHANGES = {"optim.schedule": "cosine", "optim.warmup": 2, "optim.clip": 0.1}
BALANCE = {"moe.aux_loss": 0.1, "moe.bias_rate": 0.01}  # routers' biases move, and are part of the state
TIED = (
    "dense-tied",
)  # under a pipeline two processes' gradients of the embedding are summed, in another order

Layouts = dict[str, tuple[int, dict[str, Any]]]
DENSE: Layouts = {
    "1": (1, {}),
    "pp2": (2, {"pipeline": 2}),
    "tp2": (2, {"tensor": 2}),
    "tp2-pp2-recompute": (4, {"tensor": 2, "pipeline": 2, "recompute": "full"}),
    "cp2": (2, {"context": 2}),
    "pp2-cp2": (4, {"pipeline": 2, "context": 2}),
    "dp2-zero1": (2, {"zero": 1}),
    "dp2-zero3": (2, {"zero": 3}),
    "pp2-dp2-zero2": (4, {"pipeline": 2, "zero": 2}),
    "tp2-dp2-zero3": (4, {"tensor": 2, "zero": 3}),
    "dp2x2-zero2": (4, {"replicate": 2, "zero": 2}),
    "cp2-dp2-zero3": (4, {"context": 2, "zero": 3}),
}
MOE: Layouts = {
    "1": (1, {}),
    "pp2-zbv": (2, {"pipeline": 2, "schedule": "zbv", "stages": [1, 0, 0, 1]}),
    "dp2-zero2": (2, {"zero": 2}),
    "dp2-zero3": (2, {"zero": 3}),
    "ep2": (2, {"expert": 2}),
    "pp2-ep2": (4, {"pipeline": 2, "expert": 2}),
    "tp2": (2, {"tensor": 2}),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}),
    "cp2-ep2": (2, {"context": 2, "expert": 2}),
    "ep4-zero1": (4, {"expert": 4, "zero": 1}),
    "ep2-dp2-zero3": (4, {"expert": 2, "zero": 3}),
    "tp2-ep4-etp1": (4, {"tensor": 2, "expert": 4, "expert_tensor": 1}),
}
STAGES: Layouts = {f"dp2-zero{stage}": (2, {"zero": stage}) for stage in range(4)}
# Dropout: the random numbers after a restart are those of a run that went on.
GROUPS: dict[str, tuple[str, str, Layouts]] = {
    "dense-lora": ("dense", "lora-dropout", DENSE),
    "moe-full": ("mla-moe", "full", MOE),
    "dense-full": ("dense-tied", "full", DENSE),
    "moe-lora": ("moe", "lora", MOE),
    "one-batch": ("dense-tied", "full", STAGES),  # a process has one micro-batch a step
}
_CHOSEN = (CHOSEN or "dense-lora,moe-full,one-batch").split(",")
GROUPS = {name: group for name, group in GROUPS.items() if name in _CHOSEN or CHOSEN == "all"}
SIZES = (2, 4)


class Run:
    """One layout's model, trainer and state in this process."""

    def __init__(self, group: str, layout: str, worlds: dict[str, Any]) -> None:
        from megatune import parallel
        from megatune.models import family_for
        from megatune.training.assemble import assemble, training_parts
        from megatune.training.step import Trainer

        family, method, layouts = GROUPS[group]
        self.group = group
        changes = CHANGES | (BALANCE if family == "mla-moe" else {})
        config = config_of(Case(family, method, layouts[layout][1], changes))
        key = repr(sorted(layouts[layout][1].items()))
        if layouts[layout][0] == 1:  # in a process of two
            worlds[key] = replace(parallel.World.alone(), config=config.parallel)
        elif key not in worlds:
            worlds[key] = parallel.init(config.parallel, device="cpu")
        self.world = worlds[key]
        settings = FAMILIES[family] | {"num_hidden_layers": 2}
        self.zero = (
            built := assemble(family_for(settings).spec(settings), config, self.world, torch.float32)
        ).zero
        fill(self.zero.weights())
        self.zero.publish()
        self.optimizer, pipeline, self.state = training_parts(built, config, self.world, torch.float32)
        self.trainer = Trainer(built.model, self.zero, self.optimizer, pipeline, self.world, config, WHOLE)

    def train(self, first: int, stop: int, before_update: Any = None) -> Outcome:
        losses, norms = [], []
        for step in range(first, stop):
            found, targets = batches(step)
            if self.group == "one-batch":
                found = found[: self.world.dp_size]
                targets = sum(len(batch.targets.index) for batch in found)
            mine = found[self.world.dp_rank :: self.world.dp_size]
            result = self.trainer.step(mine, targets, before_update=before_update)
            losses.append(result.loss)
            norms.append(result.grad_norm)
        return Outcome(losses, norms, list(self.pieces()))

    def pieces(self) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]:
        for name, parts in self.state.items():
            if parts.writes:
                for box, tensor in parts.parts:
                    yield name, box.offset, tuple(parts.shape), tensor.detach().clone()


def _layouts_of(layouts: Layouts, rank: int, world_size: int) -> list[str]:
    """Those that this process takes part in: of one process too, where it is the first of two."""
    sizes = {world_size} | ({1} if (rank, world_size) == (0, 2) else set())
    return [name for name, (processes, _) in layouts.items() if processes in sizes]


def _save_all(rank: int, world_size: int, folder: Path) -> dict[str, tuple[Outcome, Outcome]]:
    """(state and losses after half of the steps, and at the end) of each layout of this many processes."""
    from megatune import checkpoint

    worlds: dict[str, Any] = {}
    found = {}
    for group, (_, _, layouts) in GROUPS.items():
        for layout in _layouts_of(layouts, rank, world_size):
            run = Run(group, layout, worlds)
            half = run.train(0, HALF)
            saver = checkpoint.Saver(folder / group / layout, run.state, run.world)
            pending = saver.save(HALF, {"from": layout})
            whole = run.train(HALF, WHOLE, before_update=pending.wait_staged)
            pending.wait()
            run.world.barrier()
            found[f"{group}/{layout}"] = half, whole
    return found


def _load_all(rank: int, world_size: int, folder: Path) -> dict[str, Outcome | list[str]]:
    """What each layout of this many processes finds wrong in each checkpoint, and how it goes on from some."""
    from megatune import checkpoint

    worlds: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for group, (_, _, layouts) in GROUPS.items():
        for layout in _layouts_of(layouts, rank, world_size):
            run = Run(group, layout, worlds)
            for source in layouts:
                for parts in run.state.values():
                    for _, tensor in parts.parts:
                        tensor.detach().fill_(float("nan"))
                restored = checkpoint.restore(folder / group / source, run.state, run.world)
                assert restored is not None and restored[1] == {"from": source}
                truth = load_file(folder / group / f"{source}.safetensors")
                key = f"{group}/{source}/{layout}"
                found[f"wrong/{key}"] = _differences(run, truth)
                if CHOSEN or _is_neighbour(layouts, source, layout):
                    run.zero.publish()
                    run.optimizer.load_steps(HALF)
                    found[key] = run.train(HALF, WHOLE)
    return found


def _differences(run: Run, truth: dict[str, Tensor]) -> list[str]:
    return [
        name
        for name, parts in run.state.items()
        for box, tensor in parts.parts
        if tuple(parts.shape) != truth[name].shape or not torch.equal(tensor.detach(), box.of(truth[name]))
    ]


def _is_neighbour(layouts: Layouts, source: str, target: str) -> bool:
    names = list(layouts)
    return (names.index(source) + 1) % len(names) == names.index(target)


def _is_bitwise(group: str, one: str, other: str) -> bool:
    """Whether only pipeline, ZeRO and recompute differ, and all sums come in the same order."""
    family, _, layouts = GROUPS[group]
    if layouts is STAGES:
        return True
    sections = [layouts[name][1] for name in (one, other)]
    free = ("pipeline", "schedule", "stages", "zero", "recompute")
    there, here = ({k: v for k, v in section.items() if k not in free} for section in sections)
    widths = [layouts[name][0] // layouts[name][1].get("pipeline", 1) for name in (one, other)]
    moves = len({section.get("pipeline", 1) for section in sections}) > 1 and family in TIED
    sums = {section.get("zero", 1) >= 2 for section in sections}
    return there == here and widths[0] == widths[1] and not moves and (len(sums) == 1 or widths[0] == 1)


States = tuple[Outcome, Outcome, dict[str, Tensor], dict[str, Tensor]]


def _saved(ranks: list[dict[str, tuple[Outcome, Outcome]]], folder: Path) -> dict[str, States]:
    """(half, whole, global state after the half and at the end) of each layout; the first state is left in a file."""
    found = {}
    for key, (half, whole) in ranks[0].items():
        states = [
            one.weights([other[key][i] for other in ranks[1:] if key in other])
            for i, one in enumerate((half, whole))
        ]
        save_file(states[0], folder / f"{key}.safetensors")
        found[key] = half, whole, *states
    return found


def _save_and_load(
    rank: int, world_size: int, folder: Path
) -> tuple[dict[str, States] | None, dict[str, Any]]:
    """The largest number of processes: all others have saved."""
    mine = _save_all(rank, world_size, folder)
    ranks = [None] * world_size if rank == 0 else None
    dist.gather_object(mine, ranks, dst=0)
    found = _saved(ranks, folder) if rank == 0 else None
    dist.barrier()
    return found, _load_all(rank, world_size, folder)


@cache
def everything(folder: Path) -> tuple[dict[str, States], dict[str, list[Any]]]:
    """What was saved under each layout, and what each rank of each layout found."""
    before: dict[str, States] = {}
    for size in SIZES[:-1]:
        before |= _saved(run_ranks(_save_all, size, folder, timeout=600), folder)
    largest = run_ranks(_save_and_load, SIZES[-1], folder, timeout=1500)
    before |= largest[0][0]
    loads = [[rank[1] for rank in largest]]
    loads += [run_ranks(_load_all, size, folder, timeout=1500) for size in SIZES[:-1]]
    return before, {key: [rank[key] for rank in ranks if key in rank] for ranks in loads for key in ranks[0]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


pytestmark = pytest.mark.timeout(1800)


@pytest.mark.parametrize("group", GROUPS)
def test_every_layout_loads_every_other_bit_for_bit(folder: Path, group: str) -> None:
    layouts = GROUPS[group][2]
    assert len(layouts) >= 12 or layouts is STAGES
    saved, found = everything(folder)
    for source in layouts:
        for target in layouts:
            wrong = found[f"wrong/{group}/{source}/{target}"]
            assert len(wrong) == layouts[target][0]
            assert not any(wrong), f"saved under {source}, loaded under {target}: {wrong}"
    states = [saved[f"{group}/{layout}"][2] for layout in layouts]
    names = {name.split("/")[0] for name in states[0]} | {"/".join(name.split("/")[:2]) for name in states[0]}
    assert {"model", "optim/exp_avg", "optim/exp_avg_sq"} <= names
    assert all(state.keys() == states[0].keys() for state in states)


@pytest.mark.parametrize("group", GROUPS)
def test_a_run_goes_on_as_if_it_never_stopped(folder: Path, group: str) -> None:
    layouts = GROUPS[group][2]
    saved, loaded = everything(folder)
    bitwise = 0
    for source in layouts:
        for target in layouts:
            if f"{group}/{source}/{target}" not in loaded:
                continue
            found = loaded[f"{group}/{source}/{target}"]
            _, expected, _, truth = saved[f"{group}/{source}"]
            weights = found[0].weights(found[1:])
            where = f"saved under {source}, went on under {target}"
            if _is_bitwise(group, source, target):
                bitwise += source != target
                assert all(outcome.losses == expected.losses for outcome in found), where
                different = [name for name, tensor in truth.items() if not torch.equal(weights[name], tensor)]
                assert not different, f"{where}: {different}"
            else:
                for outcome in found:
                    assert outcome.losses == pytest.approx(expected.losses, rel=LOSS), where
                for name, tensor in truth.items():
                    norm = torch.linalg.vector_norm
                    error = norm(weights[name] - tensor) / max(norm(tensor), 1e-20)
                    assert not name.startswith("model/") or error <= WEIGHT, (
                        f"{where}: {name} is off by {error:.1e}"
                    )
            for outcome in found:
                assert outcome.norms == pytest.approx(expected.norms, rel=NORM), where
    assert bitwise or group == "dense-full"  # no pair of these lists where embeddings are tied


def test_going_on_depends_on_what_is_restored(folder: Path) -> None:
    """A moment, a step or a weight that is not as it was saved is seen in what follows."""
    everything(folder)
    run_ranks(_forget, 1, folder)


def _forget(rank: int, world_size: int, folder: Path) -> None:
    from megatune import checkpoint

    group = next(iter(GROUPS))
    outcomes = []
    for forgotten in (None, "optim/exp_avg/", "optim/exp_avg_sq/", "model/", "step"):
        run = Run(group, "1", {})
        checkpoint.restore(folder / group / "1", run.state, run.world)
        for name, parts in run.state.items():
            if forgotten and name.startswith(forgotten):
                parts.parts[0][1].detach().mul_(1.01)
                break
        run.zero.publish()
        run.optimizer.load_steps(HALF - (forgotten == "step"))
        outcomes.append(run.train(HALF, WHOLE).losses)
    assert all(outcome != outcomes[0] for outcome in outcomes[1:])
