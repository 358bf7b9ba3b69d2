"""A model as a Hugging Face folder, gathered and written tensor by tensor."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from megatune.checkpoint.pretrained import base_map
from megatune.checkpoint.resolve import ModelFolder
from megatune.checkpoint.safetensors_file import SafetensorsWriter
from megatune.checkpoint.sources import INDEX, SINGLE
from megatune.errors import CheckpointError
from megatune.models.registry import family_named

MAX_SHARD_BYTES = 5 * 10**9
# What travels from the source folder beside the weights.
_COPIED = (
    "tokenizer*",
    "*.model",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def export_hf(
    model: nn.Module,
    folder: Path,
    *,
    source: ModelFolder | None,
    merge: bool,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `model` (a `Decoder`, maybe sharded) as a folder that transformers opens with equal logits.

    `source`: the folder that it came from, which gives the config's other keys, tokenizer, chat template and
    generation config. `merge`: add the adapters to the weights (in fp32); else they are left out. `dtype`: of all
    tensors, default the embedding's. Every rank calls it; tensors are gathered one by one and rank 0 writes them. The
    folder appears whole or not at all; a model folder that is there is replaced. CheckpointError on every rank where
    rank 0 cannot write.
    """
    keep_sharded(model)
    dtype = dtype or next(model.parameters()).dtype
    config = family_named(model.spec.family).hf_config(model.spec, source.hf_config if source else None)
    if not is_main():
        for _ in hf_tensors(model, merge=merge, dtype=dtype, wanted=False):
            pass
        agree(None)
        return
    tensors = hf_tensors(model, merge=merge, dtype=dtype)
    error = None
    try:
        shapes = {
            name: shape for item in base_map(model).values() for name, shape in item.hf_shapes().items()
        }
        with FolderWriter(folder, shapes, dtype, config, source.path if source else None) as writer:
            for name, tensor in tensors:
                writer.write(name, tensor)
    except (OSError, CheckpointError) as problem:
        for _ in tensors:  # the other ranks are still gathering
            pass
        error = sentence(problem, folder)
    agree(error)


def hf_tensors(
    model: nn.Module, *, merge: bool, dtype: torch.dtype, wanted: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor in `dtype`) of each tensor of a checkpoint of `model`, on the model's device.

    Every rank must exhaust it, as sharded tensors are gathered on the way; one whole tensor is in memory at a time.
    `wanted` False: take part in that and yield nothing.
    """
    with torch.no_grad():
        for name, mapped in base_map(model).items():
            tensor = model.get_parameter(name).detach()
            adapter = _adapter_of(model, name) if merge else None
            if adapter is None:
                whole = gather(tensor.to(dtype))  # cast first: fewer bytes to gather
            else:
                whole, a, b = gather(tensor), gather(adapter.lora_a.detach()), gather(adapter.lora_b.detach())
                if wanted:
                    whole = (whole.float() + adapter.delta(a, b)).to(dtype)
            if wanted:
                yield from mapped.split(whole)


def gather(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on every rank of its mesh."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class FolderWriter:
    """Writes a Hugging Face folder: weights in shards of at most MAX_SHARD_BYTES, their index, config and the
    `source` folder's tokenizer files. A context manager; the folder takes its place on a clean exit.

    `shapes`: of all tensors by Hugging Face name, in the order in which `write` will be called. CheckpointError where
    `folder` is there and is no model folder.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        config: Mapping[str, Any],
        source: Path | None,
    ) -> None:
        self._folder = folder
        self._temporary = temporary_beside(folder, source)
        self._shards = _plan(shapes, dtype)
        self._config, self._source, self._dtype = config, source, dtype
        self._shapes = shapes
        self._open: SafetensorsWriter | None = None
        self._count = 0

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor, in the folder's dtype."""
        if self._open is None:
            self._count += 1
            path = self._temporary / _file_name(self._count, len(self._shards))
            shard = self._shards[self._count - 1]
            self._open = SafetensorsWriter(path, [(n, self._dtype, self._shapes[n]) for n in shard])
        self._open.write(name, tensor)
        if name == self._shards[self._count - 1][-1]:
            self._open.close()
            self._open = None

    def __enter__(self) -> FolderWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            if self._open is not None:
                self._open.abort()
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _finish(self) -> None:
        if self._open is not None or self._count != len(self._shards):
            raise ValueError(f"{self._folder}: not all announced tensors were written")
        if len(self._shards) > 1:
            files = {
                n: _file_name(i + 1, len(self._shards)) for i, shard in enumerate(self._shards) for n in shard
            }
            total = sum(math.prod(shape) for shape in self._shapes.values()) * self._dtype.itemsize
            write_json(self._temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
        config = dict(self._config)
        for key in {"torch_dtype", "dtype"} & config.keys() or {"torch_dtype"}:
            config[key] = str(self._dtype).removeprefix("torch.")
        if self._source is not None:
            for file in {
                file for pattern in _COPIED for file in self._source.glob(pattern) if file.is_file()
            }:
                shutil.copyfile(file, self._temporary / file.name)
        write_json(self._temporary / "config.json", config)
        put_in_place(self._temporary, self._folder)


def temporary_beside(folder: Path, source: Path | None) -> Path:
    """A fresh hidden folder next to `folder`, to be renamed to it. CheckpointError where `folder` must not be
    replaced: it is the source, a file, or holds something else than a model."""
    if folder.exists():
        if source is not None and folder.samefile(source):
            raise CheckpointError(f"{folder}: is the folder that the model comes from; export to another one")
        is_model = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
        if not folder.is_dir() or (any(folder.iterdir()) and not is_model):
            raise CheckpointError(f"{folder}: is there and is no model folder; export to another one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left behind by a run that died
    temporary.mkdir()
    return temporary


def put_in_place(temporary: Path, folder: Path) -> None:
    """Rename a finished folder to `folder`, in place of one that is there."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def agree(error: str | None) -> None:
    """End a step in which rank 0 wrote: CheckpointError on every rank where it failed, and a barrier."""
    box = [error]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    if box[0] is not None:
        raise CheckpointError(box[0])


def sentence(problem: Exception, folder: Path) -> str:
    if isinstance(problem, OSError):
        return f"{folder}: cannot be written ({problem.strerror or problem})"
    return str(problem)


def is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def keep_sharded(model: nn.Module) -> None:
    """After an evaluation fully_shard may still hold whole parameters, in another dtype; the sharded ones are meant."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _adapter_of(model: nn.Module, name: str) -> nn.Module | None:
    module, _, kind = name.rpartition(".")
    return getattr(model.get_submodule(module), "adapter", None) if kind == "weight" else None


def _plan(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> list[list[str]]:
    """Names of each shard, in order; a tensor larger than a shard has one to itself."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        own = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + own > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += own
    return shards


def _file_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
