"""DeepSpeed checkpoints: a folder with `latest` and a folder for each step, or one such folder; ZeRO 0 to 3, universal.

Weights come in the dtype of training, as the run had them; with `dtype` fp32 they are the optimizer's fp32 weights, the
same numbers as DeepSpeed's own `zero_to_fp32.py` gives.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatune.checkpoint.convert.base import Format, Line, Opened, Options
from megatune.checkpoint.convert.deepspeed_flat import Flat, FlatSource
from megatune.checkpoint.convert.deepspeed_universal import is_universal, open_universal
from megatune.checkpoint.convert.deepspeed_zero import Zero, open_zero
from megatune.checkpoint.convert.names import Cast
from megatune.checkpoint.sources import read_json
from megatune.errors import CheckpointError, ConfigError
from megatune.models.registry import family_for

_POINTERS = ("latest", "latest_universal")
_STEP = re.compile(r"global_step(\d+)(_universal)?")
_PEFT = re.compile(r"\.(lora_[A-Z]\w*|base_layer|modules_to_save|original_module)\.")


def detect(path: Path) -> bool:
    if not path.is_dir():
        return False
    if _is_step(path):
        return True
    pointed = any((path / pointer).is_file() for pointer in _POINTERS)
    return any(_is_step(one) for one in path.iterdir() if pointed or _STEP.fullmatch(one.name))


def open_deepspeed(path: Path, options: Options) -> Opened:
    """A DeepSpeed checkpoint. Memory: what is asked of a tensor, and the optimizer of nobody."""
    folder = _step_folder(path, options.step)
    home = _home(path, folder, options)
    config = read_json(home if home.is_file() else home / "config.json")
    zero = open_universal(folder) if is_universal(folder) else open_zero(folder)
    _refuse_adapters(zero, folder)
    lines = list(zero.lines)
    weights = dict(zero.weights)
    masters = zero.states.get("master", {})
    for name, flat in masters.items():
        if name not in weights or options.dtype == torch.float32:
            weights[name] = flat
    for alias, name in zero.aliases.items():
        if alias not in weights and name in weights:
            weights[alias] = weights[name]
            lines.append(Line(alias, "tied", f"shared with {name} in DeepSpeed"))
    dtypes = {}
    if options.dtype is None and zero.dtype != torch.float32:
        dtypes = {name: zero.dtype for name, flat in weights.items() if flat.dtype == torch.float32}
        dtypes = {
            name: dtype
            for name, dtype in dtypes.items()
            if name in masters or zero.aliases.get(name) in masters
        }
    prefix = _prefix(set(weights), config, home)
    source = Cast(
        _source(folder, weights, prefix), {name.removeprefix(prefix): one for name, one in dtypes.items()}
    )
    words = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    lines = [replace(line, tensor=line.tensor.removeprefix(prefix)) for line in lines]
    lines += [
        Line(
            name.removeprefix(prefix),
            "cast",
            f"fp32 weights of the optimizer to {words[dtype]}, as in training",
        )
        for name, dtype in sorted(dtypes.items())
    ]
    optimizer = {slot: _source(folder, found, prefix) for slot, found in zero.states.items() if found}
    extras = home.parent if home.is_file() else home
    return Opened(
        "deepspeed", path, config, source, optimizer if options.optimizer else {}, zero.step, extras, lines
    )


def _source(folder: Path, tensors: dict[str, Flat], prefix: str) -> FlatSource:
    return FlatSource(str(folder), {name.removeprefix(prefix): flat for name, flat in tensors.items()})


def _is_step(path: Path) -> bool:
    if not path.is_dir():
        return False
    return any(path.glob("*mp_rank_*model_states.pt")) or is_universal(path)


def _step_folder(path: Path, step: int | None) -> Path:
    """The folder of a step: `path` itself, the wanted one of it, or the one that `latest` names."""
    if _is_step(path):
        return path
    steps: dict[int, Path] = {}
    for one in sorted(path.iterdir()):
        match = _STEP.fullmatch(one.name)
        if match and _is_step(one):
            steps[int(match[1])] = one
    if step is not None:
        if step not in steps:
            there = ", ".join(map(str, sorted(steps))) or "none"
            raise CheckpointError(f"{path}: has no global_step{step}; there are steps {there}")
        return steps[step]
    for pointer in _POINTERS:
        if (path / pointer).is_file():
            return _pointed(path, pointer)
    return steps[max(steps)]


def _pointed(path: Path, pointer: str) -> Path:
    with open(path / pointer, "rb") as file:
        name = file.read(256).decode("utf-8", "replace").strip()
    if not re.fullmatch(r"[\w.\-]+", name) or set(name) == {"."} or (path / name).is_symlink():
        raise CheckpointError(
            f"{path / pointer}: {name[:40]!r} is no folder in it; name the folder of the step yourself"
        )
    if not _is_step(path / name):
        raise CheckpointError(
            f"{path / pointer}: names {name}, which is no whole checkpoint; name another step"
        )
    return path / name


def _home(path: Path, folder: Path, options: Options) -> Path:
    """Where config.json (and the tokenizer) are: `like`, or beside the checkpoint."""
    if options.like is not None:
        return Path(options.like)
    for place in dict.fromkeys((folder, path, folder.parent)):
        if (place / "config.json").is_file():
            return place
    raise CheckpointError(
        f"{path}: DeepSpeed does not save the model's config.json, and none lies beside it; name a Hugging "
        "Face folder of the same model with --like"
    )


def _refuse_adapters(zero: Zero, folder: Path) -> None:
    for name in sorted(zero.weights | zero.shapes):
        if _PEFT.search(name):
            raise CheckpointError(
                f"{folder}: holds a model with PEFT adapters ({name}), whose settings DeepSpeed does not save; "
                "convert the adapter folder that PEFT saved beside it"
            )


def _prefix(names: set[str], config: dict[str, Any], home: Path) -> str:
    """What wrappers put before every name (`module.`, `_forward_module.model.`): seen at the embedding."""
    try:
        family = family_for(config)
        embed = family.name_map(family.spec(config))["embed.weight"][0].hf_name
    except ConfigError as error:
        raise ConfigError(f"{home}/{error}") from error
    for wanted in (embed, embed.removeprefix(family.prefix)):
        for name in sorted(names):
            prefix = name.removesuffix(wanted)
            if name.endswith(wanted) and (not prefix or prefix.endswith(".")):
                return prefix if all(one.startswith(prefix) for one in names) else ""
    return ""


FORMAT = Format("deepspeed", "DeepSpeed (ZeRO 0 to 3, universal)", detect, open_deepspeed)
