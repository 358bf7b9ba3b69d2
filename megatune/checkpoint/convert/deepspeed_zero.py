"""DeepSpeed's ZeRO checkpoints: parameters and Adam's states out of the flat partitions of stages 1, 2 and 3.

Layouts as written by deepspeed 0.19 (runtime/zero/{stage_1_and_2,stage3}.py, runtime/bf16_optimizer.py,
runtime/engine.py, utils/zero_to_fp32.py). Stages 1 and 2: the parameters of a group, one after the other, padded at the
end, cut into one partition a rank. Stage 3: each parameter for itself cut into one piece a rank, the last ones padded;
rank r's vector is its piece of each parameter. What is there decides, not the version: files are recognised by keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatune.checkpoint.convert.base import SLOTS, Line
from megatune.checkpoint.convert.deepspeed_flat import Flat, whole
from megatune.checkpoint.convert.pickles import LazyTensor, open_pickle
from megatune.errors import CheckpointError

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_?model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_FOREIGN = {
    "layer_": "a DeepSpeed pipeline or its native experts, whose layers have no names of a model",
    "expp_rank_": "DeepSpeed's native experts",
}
_MOMENTS = SLOTS[1:]


@dataclass
class Zero:
    """What a ZeRO checkpoint holds, under DeepSpeed's names. `weights`: in the dtype of training where they are there,
    fp32 otherwise. `states`: slot -> trained parameters. `aliases`: name -> the parameter that it shares. `shapes`: of
    all trained parameters. `dtype`: of training."""

    weights: dict[str, Flat]
    states: dict[str, dict[str, Flat]]
    step: int | None
    dtype: torch.dtype
    aliases: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)


def open_zero(folder: Path) -> Zero:
    """A folder of one step, stage 0 to 3. CheckpointError where files are missing or do not fit together, or where it
    was written by several tensor- or pipeline-parallel ranks."""
    models, optimizers = files_of(folder)
    model = read_file(models[0])
    first = read_file(optimizers[0]) if optimizers else {}
    states = first.get("optimizer_state_dict")
    if not optimizers:
        return _plain(models[0], model)
    if not isinstance(states, dict):
        raise _unknown(optimizers[0], "optimizer_state_dict")
    found = [states, *(read_file(path).get("optimizer_state_dict") for path in optimizers[1:])]
    _check_count(folder, states, optimizers)
    if "single_partition_of_fp32_groups" in states:
        zero = _plain(models[0], model)
        _fill_cut(zero, model, found, optimizers)
    elif "fp32_flat_groups" in states:
        zero = _dealt(model, models, found, optimizers)
    else:
        raise _unknown(
            optimizers[0], "single_partition_of_fp32_groups (stage 1, 2) or fp32_flat_groups (stage 3)"
        )
    return zero


def files_of(folder: Path) -> tuple[list[Path], list[Path]]:
    """Model files and optimizer files of a step, by data-parallel rank."""
    models, optimizers = {}, {}
    for path in sorted(folder.iterdir()):
        for start, what in _FOREIGN.items():
            if path.name.startswith(start):
                raise CheckpointError(
                    f"{path}: was written by {what}; load it there and save a Hugging Face folder (save_pretrained)"
                )
        for pattern, into in ((_MODEL, models), (_OPTIMIZER, optimizers)):
            match = pattern.fullmatch(path.name)
            if match and int(match[2]):
                raise CheckpointError(
                    f"{path}: was written by several tensor- or pipeline-parallel ranks; join them with DeepSpeed's "
                    "ds_to_universal.py and convert the universal checkpoint"
                )
            if match:
                into[int(match[1] or 0)] = path
    if not models:
        raise CheckpointError(f"{folder}: has no *model_states.pt; copy the checkpoint again")
    for ranks in (models, optimizers):
        missing = set(range(len(ranks))) - ranks.keys()
        if missing:
            name = next(iter(ranks.values())).name
            raise CheckpointError(
                f"{folder}: has no file of rank {min(missing)} like {name}; copy the checkpoint again"
            )
    return [models[rank] for rank in sorted(models)], [optimizers[rank] for rank in sorted(optimizers)]


def training_dtype(settings: Any) -> torch.dtype:
    """The dtype of the model in training, from `ds_config`."""
    for key, dtype in (("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp16", torch.float16)):
        section = settings.get(key) if isinstance(settings, dict) else None
        if isinstance(section, dict) and section.get("enabled") is True:
            return dtype
    return torch.float32


def frozen_pieces(models: Sequence[Mapping[str, Any]], where: Path) -> dict[str, Flat]:
    """Parameters that are not trained: whole (stage 2), or one piece in each rank's file (stage 3)."""
    shapes = shapes_of(models[0].get("frozen_param_shapes") or {}, where)
    found = {}
    for name, shape in shapes.items():
        pieces = [(model.get("frozen_param_fragments") or {}).get(name) for model in models]
        if not all(isinstance(piece, LazyTensor) for piece in pieces):
            raise CheckpointError(
                f"{where}: holds no values of the frozen parameter {name}; save the model once more"
            )
        size = math.prod(shape) if len(pieces) == 1 else -(-math.prod(shape) // len(pieces))
        found[name] = checked(name, Flat(shape, pieces, max(1, size)), where)
    return found


def checked(name: str, flat: Flat, where: Path) -> Flat:
    if not flat.is_there():
        raise CheckpointError(
            f"{where}: the files hold less than the {flat.numel} values of {name}; copy the checkpoint again"
        )
    return flat


def aliases_of(model: Mapping[str, Any]) -> dict[str, str]:
    shared = model.get("shared_params") or {}
    return {str(name): str(other) for name, other in shared.items()} if isinstance(shared, dict) else {}


def step_of(model: Mapping[str, Any]) -> int | None:
    step = model.get("global_steps")
    return step if type(step) is int and step >= 0 else None


def read_file(path: Path) -> dict[str, Any]:
    found = open_pickle(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: is no file of a DeepSpeed checkpoint; copy the checkpoint again")
    return found


def _unknown(path: Path, key: str) -> CheckpointError:
    return CheckpointError(f"{path}: has no {key}, so it is not of a DeepSpeed version that is known here")


def _check_count(folder: Path, states: Mapping[str, Any], optimizers: Sequence[Path]) -> None:
    counts = states.get("partition_count")
    counts = counts if isinstance(counts, list) else [counts]
    if len(set(counts)) > 1 or states.get("ds_zero_partition_groups"):
        raise CheckpointError(
            f"{folder}: its parameters are partitioned over groups of different sizes (experts of DeepSpeed); load it "
            "there and save a Hugging Face folder (save_pretrained)"
        )
    if type(counts[0]) is int and counts[0] != len(optimizers):
        raise CheckpointError(
            f"{folder}: was saved by {counts[0]} ranks, and {len(optimizers)} optimizer files are there; copy the "
            "checkpoint again"
        )


def _plain(path: Path, model: Mapping[str, Any]) -> Zero:
    """Parameters and buffers as the module has them."""
    module = model.get("module")
    if not isinstance(module, dict):
        raise _unknown(path, "module")
    weights = {str(name): whole(one) for name, one in module.items() if isinstance(one, LazyTensor)}
    zero = Zero(weights, {}, step_of(model), training_dtype(model.get("ds_config")), aliases_of(model))
    if model.get("optimizer") is not None:
        zero.lines.append(
            Line("optimizer states", "skipped", "ZeRO stage 0 saves them without the parameters' names")
        )
    return zero


def _fill_cut(zero: Zero, model: Mapping[str, Any], ranks: Sequence[Any], paths: Sequence[Path]) -> None:
    """Stages 1 and 2, and BF16_Optimizer: states out of partitions of each group."""
    groups = _groups(model, paths[0])
    frozen = frozen_pieces([model], paths[0]) if model.get("frozen_param_fragments") else {}
    zero.weights |= frozen
    masters = [
        _list(state, "single_partition_of_fp32_groups", path)
        for state, path in zip(ranks, paths, strict=True)
    ]
    paddings = ranks[0].get("param_alignment_paddings") or [[0] * len(shapes) for shapes in groups]
    if any(len(one) != len(groups) for one in (*masters, paddings)):
        raise CheckpointError(f"{paths[0]}: has other groups of parameters than the model file")
    for group, shapes in enumerate(groups):
        between = paddings[group]
        if len(between) != len(shapes) or not all(type(n) is int and 0 <= n < 1 << 20 for n in between):
            raise CheckpointError(f"{paths[0]}: param_alignment_paddings do not fit the parameters")
        vectors = {"master": [rank[group] for rank in masters]}
        for slot in _MOMENTS:
            vectors[slot] = [_moment(state.get("base_optimizer_state"), group, slot) for state in ranks]
        for slot, pieces in vectors.items():
            if all(isinstance(piece, LazyTensor) for piece in pieces):
                zero.states.setdefault(slot, {}).update(_cut(shapes, between, pieces, slot, paths[0]))
    _finish(zero, groups, paths[0])


def _cut(
    shapes: Mapping[str, tuple[int, ...]],
    between: Sequence[int],
    pieces: Sequence[LazyTensor],
    slot: str,
    where: Path,
) -> dict[str, Flat]:
    """Parameters of a group in its partitions. All of them are of one size and padding is at the very end, so that
    partitions with and without padding read alike."""
    size, first, found = max(1, *(piece.numel for piece in pieces)), 0, {}
    for (name, shape), padding in zip(shapes.items(), between, strict=True):
        found[name] = checked(f"{slot} of {name}", Flat(shape, pieces, size, first), where)
        first += math.prod(shape) + padding
    held = sum(piece.numel for piece in pieces)
    # The whole is aligned to twice the ranks, after room for aligning each parameter to 16 bytes.
    if held > first + 2 * len(pieces) + 8 + 8 * any(between) * len(shapes):
        raise CheckpointError(
            f"{where}: a group holds {held} values ({slot}), its parameters {first}; the files do not belong together"
        )
    return found


def _dealt(
    model: dict[str, Any], models: Sequence[Path], ranks: Sequence[Any], paths: Sequence[Path]
) -> Zero:
    """Stage 3: a piece of each parameter in each rank's vectors."""
    if len(models) != len(paths):
        raise CheckpointError(
            f"{models[0].parent}: has {len(paths)} optimizer files and {len(models)} model files; copy it again"
        )
    buffers = {str(name) for name in model.get("buffer_names") or ()}
    zero = _plain(models[0], model)
    zero.weights = {name: flat for name, flat in zero.weights.items() if name in buffers}
    if model.get("frozen_param_shapes"):
        zero.weights |= frozen_pieces([model, *map(read_file, models[1:])], models[0])
    groups = _groups(model, models[0])
    masters = [_list(state, "fp32_flat_groups", path) for state, path in zip(ranks, paths, strict=True)]
    if any(len(one) != len(groups) for one in masters):
        raise CheckpointError(f"{paths[0]}: has other groups of parameters than the model file")
    for group, shapes in enumerate(groups):
        vectors = {"master": [rank[group] for rank in masters]}
        for slot in _MOMENTS:
            vectors[slot] = [_moment(state.get("optimizer_state_dict"), group, slot) for state in ranks]
        for slot, pieces in vectors.items():
            if all(isinstance(piece, LazyTensor) for piece in pieces):
                zero.states.setdefault(slot, {}).update(_deal(shapes, pieces, slot, paths[0]))
    _finish(zero, groups, paths[0])
    return zero


def _deal(
    shapes: Mapping[str, tuple[int, ...]], pieces: Sequence[LazyTensor], slot: str, where: Path
) -> dict[str, Flat]:
    base, found = 0, {}
    for name, shape in shapes.items():
        size = -(-math.prod(shape) // len(pieces))
        found[name] = checked(f"{slot} of {name}", Flat(shape, pieces, max(1, size), 0, base), where)
        base += size
    if any(piece.numel != base for piece in pieces):
        raise CheckpointError(
            f"{where}: a group holds {pieces[0].numel} values ({slot}), its parameters {base} of each rank; the "
            "files do not belong together"
        )
    return found


def _finish(zero: Zero, groups: Sequence[Mapping[str, tuple[int, ...]]], where: Path) -> None:
    """Masters are there for all, or it is no checkpoint; other states count only where all parameters have them."""
    zero.shapes = {name: shape for shapes in groups for name, shape in shapes.items()}
    zero.states = {slot: found for slot, found in zero.states.items() if found.keys() == zero.shapes.keys()}
    for slot in SLOTS:
        if zero.shapes and slot not in zero.states:
            if slot == "master":
                raise CheckpointError(
                    f"{where}: holds no fp32 weights of some parameters; copy the checkpoint again"
                )
            zero.lines.append(
                Line(f"{slot} of all weights", "skipped", "the optimizer keeps none, or not one a weight")
            )


def _moment(states: Any, group: int, slot: str) -> Any:
    """A vector of Adam's state of a group: torch's dictionary, or (elastic_checkpoint) a list of groups."""
    if isinstance(states, dict):
        states = states.get("state")
        found = states.get(group) if isinstance(states, dict) else None
    else:
        found = states[group] if isinstance(states, list) and group < len(states) else None
    return found.get(slot) if isinstance(found, dict) else None


def _groups(model: Mapping[str, Any], where: Path) -> list[dict[str, tuple[int, ...]]]:
    """Name -> shape of each group, in the order of the flat vectors."""
    shapes = model.get("param_shapes")
    groups = [shapes] if isinstance(shapes, dict) else shapes
    if not isinstance(groups, list):
        raise _unknown(where, "param_shapes")
    return [shapes_of(group, where) for group in groups]


def shapes_of(group: Any, where: Path) -> dict[str, tuple[int, ...]]:
    if not isinstance(group, dict):
        raise _unknown(where, "param_shapes")
    for name, shape in group.items():
        sizes = isinstance(shape, tuple) and all(type(n) is int and 0 <= n < 1 << 48 for n in shape)
        if not isinstance(name, str) or not sizes:
            raise CheckpointError(f"{where}: {name!r} has no usable shape; copy the checkpoint again")
    return dict(group)


def _list(state: Any, key: str, path: Path) -> list[Any]:
    found = state.get(key) if isinstance(state, dict) else None
    if not isinstance(found, list):
        raise _unknown(path, key)
    return found
