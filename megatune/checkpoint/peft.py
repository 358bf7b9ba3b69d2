"""LoRA adapters in the format of the `peft` library: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatune.adapters.lora import HfModule, LoraAdapter, lora_scale
from megatune.checkpoint.boxes import whole_box
from megatune.checkpoint.collect import Collected, on_main
from megatune.checkpoint.filling import fill
from megatune.checkpoint.hf import FP32, FolderWriter, put_in_place, temporary_beside, write_json
from megatune.checkpoint.mapping import Mapped, check_source
from megatune.checkpoint.resolve import ModelFolder
from megatune.checkpoint.safetensors_file import SafetensorsFile, SafetensorsWriter
from megatune.checkpoint.sources import read_json
from megatune.config.schema import LoraMethod
from megatune.errors import CheckpointError
from megatune.models.families.base import Piece
from megatune.parallel.shard import Fused, Parts

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
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
    "target_parameters": ([], None),
    "trainable_token_indices": ([], {}, None),
}


def adapters_of(model: nn.Module) -> Iterator[tuple[str, LoraAdapter]]:
    """(global name of the adapter, adapter), in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoraAdapter):
            yield name, module


def adapter_map(model: nn.Module) -> dict[str, Mapped]:
    """Each adapter parameter of `model` in a PEFT file: a permutation of rows, as for the base weights."""
    mapped: dict[str, Mapped] = {}
    for name, adapter in adapters_of(model):
        linear = model.get_submodule(name.rpartition(".")[0])
        mapped[f"{name}.lora_a"] = _map_a(adapter)
        pieces = [
            Piece(_tensor(module, "B"), piece.part, piece.first_row)
            for module in adapter.hf_modules
            for piece in module.pieces
        ]
        fused = adapter.fused or (linear.fused if pieces[0].part is not None else None)
        mapped[f"{name}.lora_b"] = Mapped(tuple(adapter.lora_b.shape), tuple(pieces), fused)
    return mapped


def _map_a(adapter: LoraAdapter) -> Mapped:
    """lora_a: the modules' A matrices one after the other."""
    names = [_tensor(module, "A") for module in adapter.hf_modules]
    shape = tuple(adapter.lora_a.shape)
    if len(names) == 1:
        return Mapped(shape, (Piece(names[0]),))
    order = Fused(tuple((name, adapter.rank) for name in names), 1)
    return Mapped(shape, tuple(Piece(name, name) for name in names), order)


def _tensor(module: HfModule, matrix: str) -> str:
    return f"{_PREFIX}{module.path}.lora_{matrix}.weight"


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
            write_json(temporary / CONFIG, _config(model, method, base_path))
            put_in_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    on_main(weights, folder, write)


def _config(model: nn.Module, method: LoraMethod, base_path: str) -> dict[str, Any]:
    modules = [module for _, adapter in adapters_of(model) for module in adapter.hf_modules]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_path,
        "r": method.rank,
        "lora_alpha": method.alpha,
        "lora_dropout": method.dropout,
        "use_rslora": method.rslora,
        "target_modules": sorted({module.target for module in modules}),
        # Files of GPT-2 store weights as [in, out].
        "fan_in_fan_out": any(piece.transpose for module in modules for piece in module.pieces),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def peft_method(folder: Path) -> LoraMethod:
    """The method that a PEFT LoRA folder was trained with. CheckpointError for a folder that is none, and for kinds
    of adapters that would not be the same here."""
    config, source = _open(folder)
    del source
    return _method(config, folder)


def load_peft(weights: Mapping[str, Parts], model: nn.Module, folder: Path) -> None:
    """Fill the adapters among `weights` from a PEFT folder; every process calls it and reads its rows. `model`: the
    whole `Decoder` with its adapters, on meta even. CheckpointError where the folder has other modules, ranks or
    scales than the model."""
    config, source = _open(folder)
    method, mapped = _method(config, folder), adapter_map(model)
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
    config, deltas = _open(adapter)
    scale = lora_scale(_method(config, adapter))
    source = base.tensors()
    names = sorted(source.names(), key=lambda name: (not name.endswith(FP32), name))
    dtype = dtype or source.dtype(max(names, key=lambda name: math.prod(source.shape(name))))
    left = deltas.names()
    shapes = {name: source.shape(name) for name in names}
    with FolderWriter(folder, shapes, dtype, base.hf_config, base.path) as writer:
        for name in names:
            tensor = source.rows(name, 0, shapes[name][0])
            a, b = (f"{_PREFIX}{name.removesuffix('.weight')}.lora_{matrix}.weight" for matrix in "AB")
            if a in left and b in left:
                left -= {a, b}
                change = _rows(deltas, b) @ _rows(deltas, a) * scale
                change = change.T if config.get("fan_in_fan_out") else change
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


def _rows(source: SafetensorsFile, name: str) -> torch.Tensor:
    return source.rows(name, 0, source.shape(name)[0]).float()


def _open(folder: Path) -> tuple[dict[str, Any], SafetensorsFile]:
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: has no {CONFIG}; give the folder of a PEFT adapter")
    config = read_json(folder / CONFIG)
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{folder}: has pickled weights only, which megatune does not open; save the adapter as safetensors"
        )
    return config, SafetensorsFile(folder / WEIGHTS)


def _method(config: dict[str, Any], folder: Path) -> LoraMethod:
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
    if targets != "all-linear" and not isinstance(targets, list):
        raise CheckpointError(
            f"{folder / CONFIG}: target_modules is {targets!r}; list the modules' names, or merge the adapter with peft"
        )
    if isinstance(targets, list):
        targets = sorted({str(target).rpartition(".")[2] for target in targets})
    return LoraMethod(
        type="lora",
        rank=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        dropout=config.get("lora_dropout") or 0.0,
        targets=targets,
        rslora=bool(config.get("use_rslora")),
    )
