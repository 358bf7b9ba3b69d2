"""Adapters' tensors in files of `peft`: their names, and how they are made of ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from megatune.adapters.expert_lora import ExpertLora
from megatune.adapters.lora import HfModule, LoraAdapter
from megatune.checkpoint.mapping import Mapped
from megatune.checkpoint.sources import TensorSource
from megatune.models.families.base import Piece
from megatune.parallel.shard import Box, Fused

PREFIX = "base_model.model."


def adapters_of(model: nn.Module) -> Iterator[tuple[str, LoraAdapter | ExpertLora]]:
    """(global name of the adapter, adapter), in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoraAdapter | ExpertLora):
            yield name, module


def adapter_map(model: nn.Module) -> dict[str, Mapped]:
    """Each adapter parameter of `model` (whole) in a PEFT file: a permutation of rows, as for the base weights."""
    mapped: dict[str, Mapped] = {}
    wrapped = _wrapped(model)
    for name, adapter in adapters_of(model):
        linear = model.get_submodule(name.rpartition(".")[0])
        shapes = {one.name.rpartition(".")[2]: one.shape for one in adapter.shard_specs(name)}
        if is_parameter(adapter):
            for key, shape in shapes.items():
                tensor = f"{PREFIX}{wrapped[name]}.lora_{key[-1].upper()}.weight"
                mapped[f"{name}.{key}"] = StackedFactor(shape, (Piece(tensor),))
            continue
        mapped[f"{name}.lora_a"] = _map_a(adapter, shapes["lora_a"])
        pieces = [
            Piece(_tensor(module, "B"), piece.part, piece.first_row, expert=piece.expert)
            for module in adapter.hf_modules
            for piece in module.pieces
        ]
        fused = adapter.fused or (linear.fused if pieces[0].part is not None else None)
        mapped[f"{name}.lora_b"] = Mapped(shapes["lora_b"], tuple(pieces), fused)
    return mapped


def is_parameter(adapter: LoraAdapter | ExpertLora) -> bool:
    """Whether it adapts one parameter that holds all experts (GPT-OSS), which PEFT calls a target parameter."""
    return isinstance(adapter, ExpertLora) and adapter.hf_modules[0].pieces[0].expert is None


@dataclass(frozen=True)
class StackedFactor(Mapped):
    """A factor of all experts as PEFT stores it for a target parameter: A [E, r, in] as [E * r, in], B [E, out, r] as
    [out, r * E]; `pieces` is that one tensor."""

    @property
    def _is_a(self) -> bool:
        return self.pieces[0].hf_name.endswith("lora_A.weight")

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        experts, rows, columns = self.shape
        shape = (experts * rows, columns) if self._is_a else (rows, columns * experts)
        return {self.pieces[0].hf_name: shape}

    def read_box(self, source: TensorSource, box: Box) -> Tensor:
        experts, rows, columns = self.shape
        name = self.pieces[0].hf_name
        if self._is_a:
            first, count = box.offset[0], box.shape[0]
            found = source.rows(name, first * rows, (first + count) * rows).unflatten(0, (count, rows))
            return Box((0, *box.offset[1:]), box.shape).of(found)
        first, count = box.offset[1], box.shape[1]
        found = source.rows(name, first, first + count).unflatten(1, (columns, experts)).permute(2, 0, 1)
        return Box((box.offset[0], 0, box.offset[2]), box.shape).of(found)

    def split(self, tensor: Tensor, box: Box | None = None) -> Iterator[tuple[str, Tensor]]:
        whole = tensor.flatten(0, 1) if self._is_a else tensor.permute(1, 2, 0).flatten(1)
        yield self.pieces[0].hf_name, whole.contiguous()


def _map_a(adapter: LoraAdapter | ExpertLora, shape: tuple[int, ...]) -> Mapped:
    """lora_a: the modules' A matrices one after the other, of each expert where there are some."""
    pieces, parts = [], {}
    for module in adapter.hf_modules:
        part = ",".join(str(name) for name in module.parts)
        parts[part] = adapter.rank
        pieces.append(Piece(_tensor(module, "A"), part, expert=module.pieces[0].expert))
    if len(parts) == 1:
        return Mapped(shape, tuple(Piece(piece.hf_name, expert=piece.expert) for piece in pieces))
    return Mapped(shape, tuple(pieces), Fused(tuple(parts.items()), 1))


def _tensor(module: HfModule, matrix: str) -> str:
    return f"{PREFIX}{module.path}.lora_{matrix}.weight"


def _wrapped(model: nn.Module) -> dict[str, str]:
    """PEFT's module for each adapter of a target parameter. It wraps the module that has the parameter, once for each
    parameter, the first one innermost."""
    found: dict[str, list[str]] = {}
    for name, adapter in adapters_of(model):
        if is_parameter(adapter):
            found.setdefault(adapter.hf_modules[0].path.rpartition(".")[0], []).append(name)
    return {
        name: path + ".base_layer" * (len(names) - 1 - depth)
        for path, names in found.items()
        for depth, name in enumerate(names)
    }
