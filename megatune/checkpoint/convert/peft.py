"""PEFT LoRA folders: read (merged into their base, or alone), written from runs that trained one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatune.adapters.lora import lora_scale
from megatune.checkpoint.convert.base import Format, Job, Line, Opened, Options, kin
from megatune.checkpoint.convert.digest import bytes_of, portions
from megatune.checkpoint.convert.disk import opened as opened_file
from megatune.checkpoint.convert.disk import write_at
from megatune.checkpoint.convert.names import check_tied, whole_model
from megatune.checkpoint.hf import write_json
from megatune.checkpoint.peft import (
    CONFIG,
    WEIGHTS,
    adapter_method,
    factor_modules,
    open_adapter,
    weight_change,
)
from megatune.checkpoint.peft_names import PREFIX
from megatune.checkpoint.resolve import resolve_model
from megatune.checkpoint.safetensors_file import header_of
from megatune.checkpoint.sources import TensorSource
from megatune.errors import CheckpointError

# Rows whose change is computed at once: always the same ones, so that every reader gets the same bits.
_ROWS = 256


class Merged:
    """A `TensorSource`: the weights of `base` with a LoRA adapter added, in fp32, then in the dtype of the base.
    `config`: its adapter_config.json. CheckpointError where the adapter does not fit the base."""

    def __init__(self, base: TensorSource, deltas: TensorSource, config: dict[str, Any]) -> None:
        self._base, self._deltas, self._config = base, deltas, config
        self._scale = lora_scale(adapter_method(config, Path(str(deltas))))
        modules = factor_modules(sorted(base.names()), config)
        left = deltas.names()
        self.adapted: dict[str, str] = {}
        for name, module in modules.items():
            a, b = (f"{PREFIX}{module}.lora_{matrix}.weight" for matrix in "AB")
            if a in left and b in left:
                left = left - {a, b}
                self.adapted[name] = module
        if left:
            raise CheckpointError(
                f"{deltas}: {len(left)} tensors have no place in {base}, the first is {min(left)}; the adapter belongs "
                "to another base model"
            )
        self._factors: tuple[str, Tensor, Tensor] | None = None

    def __str__(self) -> str:
        return str(self._base)

    def names(self) -> set[str]:
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._base.dtype(name)

    def kin(self, name: str) -> str:
        return kin(self._base, name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        tensor = self._base.rows(name, start, stop)
        if name not in self.adapted or start == stop:
            return tensor
        change = self._change(name, start, stop)
        return (tensor.float() + change * self._scale).to(tensor.dtype)

    def _change(self, name: str, start: int, stop: int) -> Tensor:
        a, b = self._read(name)
        shape = self.shape(name)
        if len(shape) == 3:
            each = [self._of_expert(a, b, expert, shape[0]) for expert in range(start, stop)]
            return torch.stack(each)
        first, last = start // _ROWS * _ROWS, min(shape[0], -(-stop // _ROWS) * _ROWS)
        blocks = []
        for row in range(first, last, _ROWS):
            until = min(last, row + _ROWS)
            if self._config.get("fan_in_fan_out"):
                blocks.append(weight_change(a[:, row:until], b, shape, self._config))
            else:
                blocks.append(weight_change(a, b[row:until], shape, self._config))
        return torch.cat(blocks)[start - first : stop - first]

    @staticmethod
    def _of_expert(a: Tensor, b: Tensor, expert: int, experts: int) -> Tensor:
        """The change [in, out] of one expert of a stacked tensor."""
        mine = a.unflatten(0, (experts, -1))[expert]
        return (b.unflatten(1, (-1, experts))[:, :, expert] @ mine).T

    def _read(self, name: str) -> tuple[Tensor, Tensor]:
        if self._factors is None or self._factors[0] != name:
            names = (f"{PREFIX}{self.adapted[name]}.lora_{matrix}.weight" for matrix in "AB")
            a, b = (self._deltas.rows(n, 0, self._deltas.shape(n)[0]).float() for n in names)
            shape = self.shape(name)[-2:]
            turned = self._config.get("fan_in_fan_out") or len(self.shape(name)) == 3
            if a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != (shape[::-1] if turned else shape):
                raise CheckpointError(
                    f"{self._deltas}: the factors of {name} are {list(a.shape)} and {list(b.shape)}, the weight is "
                    f"{list(self.shape(name))}; the adapter belongs to another base model"
                )
            self._factors = (name, a, b)
        return self._factors[1], self._factors[2]


def merged(opened: Opened, folder: Path) -> Opened:
    """`opened` with the adapter in `folder` added to its weights."""
    config, deltas = open_adapter(folder)
    return with_adapter(opened, deltas, config)


def with_adapter(opened: Opened, deltas: TensorSource, config: dict[str, Any]) -> Opened:
    """`opened`, a whole model, with an adapter added to its weights."""
    whole = whole_model(opened)
    check_tied(whole, opened.weights)
    weights = Merged(whole.weights, deltas, config)
    lines = [
        Line(name, "mapped", f"merged with lora of {module}")
        for name, module in sorted(weights.adapted.items())
    ]
    skipped = [
        Line(f"{slot} of all weights", "skipped", "is not that of the merged weights")
        for slot in opened.optimizer
    ]
    return replace(
        whole,
        weights=weights,
        adapter=(config, deltas),
        optimizer={},
        report=[*whole.report, *lines, *skipped],
    )


def detect(path: Path) -> bool:
    return (path / CONFIG).is_file()


def open_peft(path: Path, options: Options) -> Opened:
    """A LoRA folder, merged into its base model: `options.like`, or what adapter_config.json names."""
    from megatune.checkpoint.convert.hf import open_hf

    config, deltas = open_adapter(path)
    base = options.like or config.get("base_model_name_or_path")
    if not base:
        raise CheckpointError(
            f"{path / CONFIG}: names no base model (base_model_name_or_path); give it with --like"
        )
    opened = open_hf(resolve_model(str(base)).path, options)
    return replace(with_adapter(opened, deltas, config), kind="peft", path=path)


def adapter_only(opened: Opened, options: Options) -> Opened:
    """The adapter that a source has."""
    if opened.adapter is None:
        raise CheckpointError(
            f"{opened.path}: has no adapter of its own, it is a whole model; choose --to hf"
        )
    lines = [line for line in opened.report if line.what == "skipped"]  # the rest is of the merged model
    return replace(opened, weights=opened.adapter[1], optimizer={}, report=lines)


def reopen(path: Path, options: Options) -> Opened:
    """A LoRA folder by itself: its tensors are the weights."""
    config, deltas = open_adapter(path)
    return Opened("peft", path, {}, deltas, adapter=(config, deltas))


class PeftTarget:
    """An adapter folder being written: small, one job."""

    def __init__(self, opened: Opened, options: Options) -> None:
        self.report: list[Line] = []
        self._source = opened.weights
        self._config = opened.adapter[0]
        names = sorted(self._source.names(), key=lambda name: (-self._source.dtype(name).itemsize, name))
        self._entries = [(name, self._source.dtype(name), self._source.shape(name)) for name in names]

    def jobs(self) -> list[Job]:
        return [Job(WEIGHTS, sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self._entries))]

    def make(self, job: Job, folder: Path) -> None:
        with opened_file(folder / job.file) as descriptor:
            end = write_at(descriptor, memoryview(header_of(self._entries)[0]), 0)
            for name, _, _ in self._entries:
                for start, stop in portions(self._source, name):
                    end = write_at(descriptor, bytes_of(self._source.rows(name, start, stop)), end)

    def finish(self, folder: Path) -> None:
        write_json(folder / CONFIG, self._config)


FORMAT = Format(
    "peft",
    "PEFT LoRA adapter",
    detect,
    open_peft,
    PeftTarget,
    takes=adapter_only,
    reopen=reopen,
    checks_names=False,
)
