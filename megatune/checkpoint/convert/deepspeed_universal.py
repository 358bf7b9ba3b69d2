"""DeepSpeed's universal checkpoints: a folder for each parameter, with a file for each of its states.

Written by deepspeed's checkpoint/ds_to_universal.py: `zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt` hold a dictionary with
the whole tensor as `param` (from stages 1 and 2), or the bare, flat tensor (from stage 3), whose shape is in the model
files that were copied beside it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatune.checkpoint.convert.base import SLOTS, Line
from megatune.checkpoint.convert.deepspeed_flat import Flat, whole
from megatune.checkpoint.convert.deepspeed_zero import (
    Zero,
    aliases_of,
    frozen_pieces,
    read_file,
    shapes_of,
    step_of,
    training_dtype,
)
from megatune.checkpoint.convert.pickles import LazyTensor, open_pickle
from megatune.errors import CheckpointError

_FILES = {"master": "fp32.pt", "exp_avg": "exp_avg.pt", "exp_avg_sq": "exp_avg_sq.pt"}


def is_universal(folder: Path) -> bool:
    zero = folder / "zero"
    return zero.is_dir() and any((one / "fp32.pt").is_file() for one in zero.iterdir() if one.is_dir())


def open_universal(folder: Path) -> Zero:
    """The folder of one step. CheckpointError where files are missing or do not fit together."""
    models = [read_file(path) for path in _model_files(folder)]
    model = models[0] if models else {}
    settings = model.get("ds_config")
    section = settings.get("zero_optimization") if isinstance(settings, dict) else None
    if isinstance(section, dict) and section.get("round_robin_gradients") is True:
        # Seen with deepspeed 0.19.8: `param_slice_mappings`, which it goes by, ignores the shuffled order.
        raise CheckpointError(
            f"{folder}: was trained with round_robin_gradients, for which DeepSpeed's ds_to_universal.py mixes up "
            "parameters; convert the original ZeRO checkpoint"
        )
    groups = model.get("param_shapes")
    shapes = (
        {name: shape for group in groups for name, shape in shapes_of(group, folder).items()}
        if groups
        else {}
    )
    states: dict[str, dict[str, Flat]] = {slot: {} for slot in SLOTS}
    for parameter in sorted((folder / "zero").iterdir()):
        for slot, file in _FILES.items():
            if (parameter / file).is_file():
                states[slot][parameter.name] = _state(parameter / file, shapes.get(parameter.name))
    absent = sorted(shapes.keys() - states["master"].keys())
    if absent:
        raise CheckpointError(
            f"{folder / 'zero' / absent[0] / 'fp32.pt'}: is missing; convert to universal again"
        )
    zero = Zero(
        dict(states["master"]), {}, step_of(model), training_dtype(model.get("ds_config")), aliases_of(model)
    )
    _add_untrained(zero, folder, models)
    _keep_states(zero, states, shapes)
    return zero


def _keep_states(zero: Zero, states: dict[str, dict[str, Flat]], shapes: dict[str, tuple[int, ...]]) -> None:
    """States of what is trained: frozen parameters and buffers can have an fp32 file too."""
    zero.shapes = shapes or {
        name: flat.shape for name, flat in (states["exp_avg"] or states["master"]).items()
    }
    for slot, found in states.items():
        kept = {name: found[name] for name in zero.shapes if name in found}
        if kept.keys() == zero.shapes.keys():
            zero.states[slot] = kept
        else:
            zero.lines.append(Line(f"{slot} of all weights", "skipped", "not there for every trained weight"))


def _add_untrained(zero: Zero, folder: Path, models: list[dict[str, Any]]) -> None:
    """Frozen parameters and buffers, from the model files of one tensor-parallel rank."""
    if not models or models[0].get("mp_world_size", 1) != 1:
        return
    module = models[0].get("module")
    for name, tensor in module.items() if isinstance(module, dict) else ():
        if isinstance(tensor, LazyTensor) and tensor.numel and name not in zero.weights:
            zero.weights[str(name)] = whole(tensor)
    if models[0].get("frozen_param_fragments"):
        zero.weights |= frozen_pieces(models, folder)


def _model_files(folder: Path) -> list[Path]:
    """Of tensor-parallel rank 0, by data-parallel rank where there are several."""
    single = folder / "mp_rank_00_model_states.pt"
    if single.is_file():
        return [single]
    found = {}
    for path in folder.glob("zero_pp_rank_*_mp_rank_00_model_states.pt"):
        rank = path.name.removeprefix("zero_pp_rank_").partition("_")[0]
        if rank.isdecimal():
            found[int(rank)] = path
    if sorted(found) != list(range(len(found))):
        raise CheckpointError(f"{folder}: model files of some ranks are missing; copy the checkpoint again")
    return [found[rank] for rank in sorted(found)]


def _state(path: Path, shape: tuple[int, ...] | None) -> Flat:
    found = open_pickle(path)
    tensor = found.get("param") if isinstance(found, dict) else found
    if not isinstance(tensor, LazyTensor):
        raise CheckpointError(f"{path}: holds no tensor; convert to universal again")
    if isinstance(found, dict) and len(tensor.shape) and tensor.shape != (tensor.numel,):
        return whole(tensor)
    if shape is None:
        return whole(tensor)
    if math.prod(shape) != tensor.numel:
        raise CheckpointError(
            f"{path}: holds {tensor.numel} values, {list(shape)} are expected; convert again"
        )
    return whole(tensor, shape)
