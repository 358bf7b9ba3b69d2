"""LoRA adapters in the format of the `peft` library: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from megatune.adapters.expert_lora import ExpertLora
from megatune.adapters.lora import lora_scale
from megatune.checkpoint.boxes import whole_box
from megatune.checkpoint.collect import Collected, on_main
from megatune.checkpoint.filling import fill
from megatune.checkpoint.hf import FP32, FolderWriter, put_in_place, temporary_beside, write_json
from megatune.checkpoint.mapping import check_source
from megatune.checkpoint.peft_names import PREFIX, adapter_map, adapters_of, is_parameter
from megatune.checkpoint.resolve import ModelFolder
from megatune.checkpoint.safetensors_file import SafetensorsFile, SafetensorsWriter
from megatune.checkpoint.sources import read_json
from megatune.config.schema import LoraMethod
from megatune.errors import CheckpointError
from megatune.parallel.shard import Parts

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Keys of adapter_config.json that change what an adapter computes, with the values that mean "not used".
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "layers_to_transform": ([], None),
    "layer_replication": ([], None),
    "trainable_token_indices": ([], {}, None),
}


def export_peft(
    weights: Mapping[str, Parts], model: nn.Module, folder: Path, *, method: LoraMethod, base_path: str
) -> None:
    """Write adapters as a folder that `peft` loads; fp32.

    `weights`: what this process holds (of the base model too, it does not matter). `model`: the whole `Decoder` with
    its adapters, on meta even. `base_path`: goes into the config as the base model. Every process calls it, rank 0
    writes. The folder appears whole or not at all; an adapter that is there is replaced. CheckpointError on every
    process where rank 0 cannot write.
    """

    def write(tensors: Collected) -> None:
        mapped = adapter_map(model)
        tensors.check({name: item.shape for name, item in mapped.items()})
        temporary = temporary_beside(folder, None)
        try:
            shapes = {key: shape for item in mapped.values() for key, shape in item.hf_shapes().items()}
            entries = [(key, torch.float32, shape) for key, shape in shapes.items()]
            with SafetensorsWriter(temporary / WEIGHTS, entries) as writer:
                for name, item in mapped.items():
                    whole = tensors.pull(name, whole_box(item.shape), torch.float32)
                    for key, tensor in item.split(whole):
                        writer.write(key, tensor)
            write_json(temporary / CONFIG, adapter_config(model, method, base_path))
            put_in_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    on_main(weights, folder, write)


def adapter_config(model: nn.Module, method: LoraMethod, base_path: str) -> dict[str, Any]:
    """adapter_config.json of the adapters that `model` has."""
    adapters = [adapter for _, adapter in adapters_of(model)]
    modules = [module for adapter in adapters if not is_parameter(adapter) for module in adapter.hf_modules]
    parameters = {adapter.hf_modules[0].path for adapter in adapters if is_parameter(adapter)}
    experts = any(isinstance(adapter, ExpertLora) for adapter in adapters)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_path,
        "r": method.rank,
        "lora_alpha": method.alpha,
        # PEFT refuses adapters of experts that had some, though it only matters in training.
        "lora_dropout": 0.0 if experts else method.dropout,
        "use_rslora": method.rslora,
        "target_modules": sorted({module.target for module in modules}),
        "target_parameters": sorted({".".join(path.split(".")[-3:]) for path in parameters}) or None,
        # Files of GPT-2 store weights as [in, out].
        "fan_in_fan_out": any(piece.transpose for module in modules for piece in module.pieces),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def peft_method(folder: Path) -> LoraMethod:
    """The method that a PEFT LoRA folder was trained with. CheckpointError for a folder that is none, and for kinds
    of adapters that would not be the same here."""
    config, source = open_adapter(folder)
    del source
    return adapter_method(config, folder)


def load_peft(weights: Mapping[str, Parts], model: nn.Module, folder: Path) -> None:
    """Fill the adapters among `weights` from a PEFT folder; every process calls it and reads its rows. `model`: the
    whole `Decoder` with its adapters, on meta even. CheckpointError where the folder has other modules, ranks or
    scales than the model."""
    config, source = open_adapter(folder)
    method, mapped = adapter_method(config, folder), adapter_map(model)
    known = {piece.hf_name for item in mapped.values() for piece in item.pieces}
    check_source(source, mapped.values(), known)
    for name, adapter in adapters_of(model):
        if not math.isclose(adapter.scale, lora_scale(method), rel_tol=1e-6):
            raise CheckpointError(
                f"{folder / CONFIG}: scales its adapters by {lora_scale(method):g} but the run by {adapter.scale:g} "
                f"({name}); set method.alpha: {method.alpha:g} and method.rslora: {str(method.rslora).lower()}"
            )
    for name, parts in weights.items():
        if ".adapter." in name:
            fill(name, parts, mapped[name], source)


def merge_peft(base: ModelFolder, adapter: Path, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write `base` with a PEFT adapter added to its weights (in fp32) as a Hugging Face folder, tensor by tensor and
    without building the model. `dtype`: of the result, default that of the base's largest tensor. CheckpointError
    where the adapter does not fit the base."""
    config, deltas = open_adapter(adapter)
    scale = lora_scale(adapter_method(config, adapter))
    source = base.tensors()
    names = sorted(source.names(), key=lambda name: (not name.endswith(FP32), name))
    dtype = dtype or source.dtype(max(names, key=lambda name: math.prod(source.shape(name))))
    left = deltas.names()
    shapes = {name: source.shape(name) for name in names}
    factors = factor_modules(names, config)
    with FolderWriter(folder, shapes, dtype, base.hf_config, base.path) as writer:
        for name in names:
            tensor = source.rows(name, 0, shapes[name][0])
            a, b = (f"{PREFIX}{factors[name]}.lora_{matrix}.weight" for matrix in "AB")
            if a in left and b in left:
                left -= {a, b}
                change = weight_change(_rows(deltas, a), _rows(deltas, b), shapes[name], config) * scale
                if change.shape != tensor.shape:
                    raise CheckpointError(
                        f"{adapter}: {a} and {b} give a change of shape {list(change.shape)} for {name}, which has "
                        f"{list(tensor.shape)}; the adapter belongs to another base model"
                    )
                tensor = tensor.float() + change
            writer.write(name, tensor)
        if left:
            raise CheckpointError(
                f"{adapter}: {len(left)} tensors have no place in {base.path}, the first is {min(left)}; the adapter "
                "belongs to another base model"
            )


def factor_modules(names: Iterable[str], config: dict[str, Any]) -> dict[str, str]:
    """The module of a PEFT file that adapts each tensor, if any does."""
    targets = config.get("target_parameters") or []
    found, wrapped = {}, {}
    for name in names:
        found[name] = name.removesuffix(".weight")
        if any(f".{name}".endswith(f".{target}") for target in targets):
            wrapped.setdefault(name.rpartition(".")[0], []).append(name)
    for path, inside in wrapped.items():
        # gate_up_proj comes before down_proj in models, and is wrapped first.
        for depth, name in enumerate(sorted(inside, key=lambda name: "down" in name)):
            found[name] = path + ".base_layer" * (len(inside) - 1 - depth)
    return found


def weight_change(
    a: torch.Tensor, b: torch.Tensor, shape: tuple[int, ...], config: dict[str, Any]
) -> torch.Tensor:
    if len(shape) == 3:  # [experts, in, out], as in GPT-OSS
        a = a.unflatten(0, (shape[0], -1))
        b = b.unflatten(1, (-1, shape[0])).permute(2, 0, 1)
        return (b @ a).transpose(1, 2)
    change = b @ a
    return change.T if config.get("fan_in_fan_out") else change


def _rows(source: SafetensorsFile, name: str) -> torch.Tensor:
    return source.rows(name, 0, source.shape(name)[0]).float()


def open_adapter(folder: Path) -> tuple[dict[str, Any], SafetensorsFile]:
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: has no {CONFIG}; give the folder of a PEFT adapter")
    config = read_json(folder / CONFIG)
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{folder}: has pickled weights only, which megatune does not open; save the adapter as safetensors"
        )
    return config, SafetensorsFile(folder / WEIGHTS)


def adapter_method(config: dict[str, Any], folder: Path) -> LoraMethod:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{folder / CONFIG}: peft_type {config.get('peft_type')!r} is not supported, LORA is; merge the "
            "adapter with peft"
        )
    for key, unused in _UNSUPPORTED.items():
        if config.get(key) not in unused:
            raise CheckpointError(
                f"{folder / CONFIG}: {key}: {config[key]!r} is not supported; merge the adapter into its base with peft"
            )
    targets = config.get("target_modules")
    parameters = [str(name) for name in config.get("target_parameters") or ()]
    if parameters and targets != "all-linear":
        targets = [*targets, *parameters] if isinstance(targets, list) else targets or parameters
    if targets != "all-linear" and not isinstance(targets, list):
        raise CheckpointError(
            f"{folder / CONFIG}: target_modules is {targets!r}; list the modules' names, or merge the adapter with peft"
        )
    if isinstance(targets, list):
        targets = sorted({str(target).rpartition(".")[2] for target in targets})
    try:
        return LoraMethod(
            type="lora",
            rank=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            dropout=config.get("lora_dropout") or 0.0,
            targets=targets,
            rslora=bool(config.get("use_rslora")),
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"{folder / CONFIG}: {first['loc'][0]} is {first['input']!r}: {first['msg']}; save the adapter again"
        ) from error
