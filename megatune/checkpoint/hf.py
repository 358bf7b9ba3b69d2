"""A model as a Hugging Face folder, collected and written tensor by tensor."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from megatune.checkpoint.boxes import whole_box
from megatune.checkpoint.collect import Collected, on_main
from megatune.checkpoint.mapping import Mapped
from megatune.checkpoint.pretrained import base_map
from megatune.checkpoint.resolve import ModelFolder
from megatune.checkpoint.safetensors_file import SafetensorsWriter
from megatune.checkpoint.sources import INDEX, SINGLE
from megatune.errors import CheckpointError
from megatune.models.registry import family_named
from megatune.parallel.shard import Box, Parts

MAX_SHARD_BYTES = 5 * 10**9
FP32 = "e_score_correction_bias"  # of routers, also in models of 16 bits
# What travels from the source folder beside the weights.
COPIED = (
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
    weights: Mapping[str, Parts],
    model: nn.Module,
    folder: Path,
    *,
    source: ModelFolder | None,
    merge: bool,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model as a folder that transformers opens with equal logits.

    `weights`: what this process holds of it. `model`: the whole `Decoder` with its adapters, on meta even: what there
    is, under any layout. `source`: the folder that it came from, which gives the config's other keys, tokenizer, chat
    template and generation config. `merge`: add the adapters to the weights (in fp32); else they are left out. `dtype`:
    of all tensors, default the embedding's. Every process calls it; rank 0 writes, and gets the tensors one by one. The
    folder appears whole or not at all; a model folder that is there is replaced. CheckpointError on every process where
    rank 0 cannot write.
    """
    config = family_named(model.spec.family).hf_config(model.spec, source.hf_config if source else None)

    def write(tensors: Collected) -> None:
        kind = dtype or tensors.dtype("embed.weight")
        mapped = _ordered(base_map(model.spec))
        shapes = {name: shape for item in mapped.values() for name, shape in item.hf_shapes().items()}
        with FolderWriter(folder, shapes, kind, config, source.path if source else None) as writer:
            for name, tensor in hf_tensors(tensors, model, merge=merge, dtype=kind):
                writer.write(name, tensor)

    on_main(weights, folder, write)


def hf_tensors(
    tensors: Collected, model: nn.Module, *, merge: bool, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor on the host) of each tensor of a checkpoint of `model`, the whole one; in `dtype`, but
    for what routers choose experts by (fp32).

    One of our tensors is in memory at a time, or one expert of it where the checkpoint has the experts one by one.
    CheckpointError where the processes do not hold it all.
    """
    mapped = _ordered(base_map(model.spec))
    tensors.check({name: item.shape for name, item in mapped.items()})
    for name, item in mapped.items():
        adapter = _adapter_of(model, name) if merge else None
        if adapter is None:
            for box in item.boxes():
                kind = torch.float32 if _is_fp32(item) else dtype
                yield from item.split(tensors.pull(name, box, kind), box)
            continue
        factors = {f"{name.rpartition('.')[0]}.adapter.{n}": p.shape for n, p in adapter.named_parameters()}
        tensors.check({factor: tuple(shape) for factor, shape in factors.items()})
        a, b = (tensors.pull(factor, whole_box(shape)) for factor, shape in factors.items())
        for box in item.boxes():
            change = adapter.delta(*(_experts(factor, item, box) for factor in (a, b)))
            merged = (tensors.pull(name, box).float() + change).to(dtype)
            yield from item.split(merged, box)


def _is_fp32(item: Mapped) -> bool:
    return item.pieces[0].hf_name.endswith(FP32)


def _ordered(mapped: dict[str, Mapped]) -> dict[str, Mapped]:
    """fp32 first, as files align their tensors."""
    return dict(sorted(mapped.items(), key=lambda item: not _is_fp32(item[1])))


def _experts(factor: Tensor, item: Mapped, box: Box) -> Tensor:
    """Of an adapter's factor [E, ..] the experts in `box`; of any other all."""
    return factor[box.offset[0] : box.offset[0] + box.shape[0]] if item.stacked else factor


class FolderWriter:
    """Writes a Hugging Face folder: weights in shards of at most MAX_SHARD_BYTES, their index, config and the
    `source` folder's tokenizer files. A context manager; the folder takes its place on a clean exit.

    `shapes`: of all tensors by Hugging Face name, in the order in which `write` will be called. `dtype`: of all of them
    but those that end in FP32, which come first. CheckpointError where `folder` is there and is no model folder.
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
        self._dtypes = {name: torch.float32 if name.endswith(FP32) else dtype for name in shapes}
        self._shards = _plan(shapes, self._dtypes)
        self._config, self._source, self._dtype = config, source, dtype
        self._shapes = shapes
        self._open: SafetensorsWriter | None = None
        self._count = 0

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor; it is cast where it has to be."""
        if self._open is None:
            self._count += 1
            path = self._temporary / _file_name(self._count, len(self._shards))
            shard = self._shards[self._count - 1]
            self._open = SafetensorsWriter(path, [(n, self._dtypes[n], self._shapes[n]) for n in shard])
        self._open.write(name, tensor.to(self._dtypes[name]))
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
            total = sum(math.prod(shape) * self._dtypes[n].itemsize for n, shape in self._shapes.items())
            write_json(self._temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
        config = {key: value for key, value in self._config.items() if key != "quantization_config"}
        for key in {"torch_dtype", "dtype"} & config.keys() or {"torch_dtype"}:
            config[key] = str(self._dtype).removeprefix("torch.")
        if self._source is not None:
            for file in {file for pattern in COPIED for file in self._source.glob(pattern) if file.is_file()}:
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


def _adapter_of(model: nn.Module, name: str) -> nn.Module | None:
    module, _, kind = name.rpartition(".")
    return getattr(model.get_submodule(module), "adapter", None) if kind == "weight" else None


def _plan(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]) -> list[list[str]]:
    """Names of each shard, in order; a tensor larger than a shard has one to itself."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        own = math.prod(shape) * dtypes[name].itemsize
        if shards[-1] and size + own > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += own
    return shards


def _file_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
