"""Checkpoints of DeepSpeed, written by plain torch: the files, keys and layouts that deepspeed 0.19.8 writes.

`tests/formats/test_deepspeed.py` compares what is read from these, and (where deepspeed is installed) from its own.
"""

from __future__ import annotations

import enum
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

States = dict[str, dict[str, Tensor]]


class LossScaler:
    def __init__(self) -> None:
        self.cur_scale = 1.0


class ZeroStageEnum(int, enum.Enum):
    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


class fragment_address:
    def __init__(self, numel: int, start: int) -> None:
        self.numel, self.start = numel, start


_CLASSES = {
    "deepspeed.runtime.fp16.loss_scaler": LossScaler,
    "deepspeed.runtime.zero.config": ZeroStageEnum,
    "deepspeed.utils.tensor_fragment": fragment_address,
}


@contextmanager
def _pickled_as_theirs() -> Iterator[None]:
    """These classes have the names of DeepSpeed's in a pickle."""
    own = {kind: kind.__module__ for kind in _CLASSES.values()}
    parents = [".".join(name.split(".")[:n]) for name in _CLASSES for n in range(1, name.count(".") + 2)]
    before = {module: sys.modules.get(module) for module in parents}
    try:
        sys.modules.update({module: ModuleType(module) for module in before})
        for module, kind in _CLASSES.items():
            setattr(sys.modules[module], kind.__name__, kind)
            kind.__module__ = module
        yield
    finally:
        for kind, module in own.items():
            kind.__module__ = module
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


@dataclass(frozen=True)
class Case:
    """How it is written. `order`: of the parameters in their groups (round_robin_gradients shuffles it). `elastic`:
    moments as a list without padding. `bf16_optimizer`: no zero_stage, padding kept. `align`: elements to which each
    parameter is aligned. `sub_group`: elements of a rank after which stage 3 begins a new group."""

    stage: int
    ranks: int = 2
    dtype: torch.dtype = torch.bfloat16
    reverse: bool = False
    elastic: bool = False
    bf16_optimizer: bool = False
    align: int = 1
    sub_group: int = 10**9
    frozen: frozenset[str] = frozenset()
    tied: Mapping[str, str] = field(default_factory=dict)


def write(root: Path, states: States, case: Case, step: int = 7) -> Path:
    """Write ROOT/latest and ROOT/global_step{step}; `states`: fp32 `master`, `exp_avg`, `exp_avg_sq` by parameter.
    Returns the folder of the step."""
    folder = root / f"global_step{step}"
    folder.mkdir(parents=True)
    (root / "latest").write_text(folder.name)
    trained = [name for name in states["master"] if name not in case.frozen]
    groups = [[n for n in trained if states["master"][n].dim() == d] for d in (2, 1)]
    if case.reverse:
        groups = [group[::-1] for group in groups]
    with _pickled_as_theirs():
        (_write_dealt if case.stage == 3 else _write_cut)(folder, states, groups, case, step)
    return folder


def _common(case: Case, step: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"zero_optimization": {"stage": case.stage}}
    if case.dtype != torch.float32:
        settings["bf16" if case.dtype == torch.bfloat16 else "fp16"] = {"enabled": True}
    return {
        "buffer_names": [],
        "optimizer": None,
        "lr_scheduler": None,
        "global_steps": step,
        "skipped_steps": 0,
        "dp_world_size": case.ranks,
        "mp_world_size": 1,
        "ds_config": settings,
        "ds_version": "0.19.8",
        "shared_params": dict(case.tied),
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
    }


def _prefix(case: Case) -> str:
    return "bf16_" if case.dtype == torch.bfloat16 else ""


def _write_cut(folder: Path, states: States, groups: Sequence[Sequence[str]], case: Case, step: int) -> None:
    """Stages 0 (no optimizer files), 1 and 2."""
    masters, model = states["master"], _common(case, step)
    module = OrderedDict((name, value.to(case.dtype)) for name, value in masters.items())
    for alias, name in case.tied.items():
        module[alias] = module[name]
    model["module"] = module
    if case.stage == 2 and case.frozen:
        model["frozen_param_shapes"] = OrderedDict((n, masters[n].shape) for n in sorted(case.frozen))
        model["frozen_param_fragments"] = {n: module[n] for n in sorted(case.frozen)}
    model["param_shapes"] = [OrderedDict((n, masters[n].shape) for n in group) for group in groups]
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    if case.stage == 0:
        return
    between = [_paddings([masters[n].numel() for n in group], case.align) for group in groups]
    vectors = {
        slot: [
            _vector([found[n] for n in group], gaps, case.ranks)
            for group, gaps in zip(groups, between, strict=True)
        ]
        for slot, found in states.items()
    }
    used = [sum(masters[n].numel() for n in g) + sum(gaps) for g, gaps in zip(groups, between, strict=True)]
    for rank in range(case.ranks):
        parts = {
            slot: [one.chunk(case.ranks)[rank].clone() for one in all_] for slot, all_ in vectors.items()
        }
        sizes = [part.numel() for part in parts["master"]]
        lean = [min(size, max(0, total - rank * size)) for size, total in zip(sizes, used, strict=True)]
        state: dict[str, Any] = {
            "partition_count": [case.ranks] * len(groups),
            "group_paddings": [size - n for size, n in zip(sizes, lean, strict=True)],
            "param_slice_mappings": [OrderedDict((n, fragment_address(1, 0)) for n in g) for g in groups],
            "clip_grad": 1.0,
            "ds_version": "0.19.8",
        }
        keep = sizes if case.bf16_optimizer else lean
        state["single_partition_of_fp32_groups"] = [p[:n] for p, n in zip(parts["master"], keep, strict=True)]
        if not case.bf16_optimizer:
            state |= {"zero_stage": ZeroStageEnum(case.stage), "loss_scaler": LossScaler()}
            state["param_alignment_paddings"] = between
        moments = [slot for slot in states if slot != "master"]
        if case.elastic:
            state["base_optimizer_state"] = [
                {slot: parts[slot][g][: lean[g]] for slot in moments} for g in range(len(groups))
            ]
        else:
            state["base_optimizer_state"] = {
                "state": {
                    g: {"step": torch.tensor(float(step))} | {slot: parts[slot][g] for slot in moments}
                    for g in range(len(groups))
                },
                "param_groups": [{"lr": 1e-3, "params": [g]} for g in range(len(groups))],
            }
        name = f"{_prefix(case)}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state, "ds_config": model["ds_config"]}, folder / name)


def _paddings(sizes: Sequence[int], align: int) -> list[int]:
    place, found = 0, []
    for number, size in enumerate(sizes):
        gap = 0 if number == len(sizes) - 1 else -(place + size) % align
        found.append(gap)
        place += size + gap
    return found


def _vector(tensors: Sequence[Tensor], gaps: Sequence[int], ranks: int) -> Tensor:
    parts = [
        part for one, gap in zip(tensors, gaps, strict=True) for part in (one.flatten(), torch.zeros(gap))
    ]
    size = sum(part.numel() for part in parts)
    return torch.cat([*parts, torch.zeros(-size % (2 * ranks))])


def _write_dealt(
    folder: Path, states: States, groups: Sequence[Sequence[str]], case: Case, step: int
) -> None:
    """Stage 3."""
    masters = states["master"]
    subs: list[list[str]] = []
    for group in groups:
        subs.append([])
        for name in group:
            if subs[-1] and sum(-(-masters[n].numel() // case.ranks) for n in subs[-1]) >= case.sub_group:
                subs.append([])
            subs[-1].append(name)
    for rank in range(case.ranks):
        model = _common(case, step) | {"shared_params": dict(case.tied) if rank == 0 else {}}
        names = [*masters, *case.tied]
        model["module"] = OrderedDict((name, torch.empty(0, dtype=case.dtype)) for name in names)
        model["param_shapes"] = [OrderedDict((n, masters[n].shape) for n in group) for group in subs]
        if case.frozen:
            frozen = sorted(case.frozen)
            model["frozen_param_shapes"] = OrderedDict((n, masters[n].shape) for n in frozen)
            model["frozen_param_fragments"] = {
                n: _piece(masters[n].to(case.dtype), rank, case.ranks) for n in frozen
            }
        torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        flats = {
            slot: [torch.cat([_piece(found[n], rank, case.ranks) for n in group]) for group in subs]
            for slot, found in states.items()
        }
        inner = {g: {slot: flats[slot][g] for slot in states if slot != "master"} for g in range(len(subs))}
        state = {
            "zero_stage": ZeroStageEnum(3),
            "loss_scaler": LossScaler(),
            "partition_count": case.ranks,
            "fp32_flat_groups": flats["master"],
            "optimizer_state_dict": {"state": inner, "param_groups": [{"params": list(range(len(subs)))}]},
        }
        name = f"{_prefix(case)}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state, "ds_config": model["ds_config"]}, folder / name)


def _piece(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """One rank's elements, padded by what memory happened to hold."""
    size = -(-tensor.numel() // ranks)
    found = torch.full((size,), float("nan"), dtype=tensor.dtype)
    part = tensor.flatten()[rank * size : (rank + 1) * size]
    found[: part.numel()] = part
    return found


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Save what `change` makes of a file."""
    with _pickled_as_theirs():
        found = torch.load(path, weights_only=False)
        change(found)
        torch.save(found, path)


def write_universal(root: Path, states: States, case: Case, step: int = 7) -> Path:
    """What ds_to_universal.py makes of it: bare flat tensors from stage 3, dictionaries otherwise."""
    source = write(root / "source", states, case, step)
    folder = root / f"global_step{step}_universal"
    for name in states["master"]:
        if name in case.frozen:
            continue
        (folder / "zero" / name).mkdir(parents=True)
        for slot, file in (("master", "fp32"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
            value = states[slot][name].clone()
            saved = value.flatten() if case.stage == 3 else {"param": value, "cat_dim": 0}
            torch.save(saved, folder / "zero" / name / f"{file}.pt")
    torch.save({"param_groups": []}, folder / "zero" / "optimizer_state.pt")
    for file in source.glob("*model_states.pt"):
        file.rename(folder / file.name)
    (root / "latest_universal").write_text(folder.name)
    return folder
