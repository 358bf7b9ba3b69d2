"""LoRA (arXiv:2106.09685): low-rank adapters beside frozen linear layers, also on parts of fused weights.

What a target is follows from the Hugging Face names: a module there is one adapter, as in PEFT, whether it is a part of
our fused weight (`q_proj` in `attn.qkv`) or all of it (Phi-3's `qkv_proj`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatune import ops
from megatune.adapters.expert_lora import attach_expert_lora
from megatune.config.schema import LoraMethod
from megatune.errors import ConfigError
from megatune.models.families.base import Piece
from megatune.models.registry import family_named
from megatune.ops import Segments
from megatune.parallel.expert import GroupedLinear
from megatune.parallel.shard import Fused, ShardSpec, local_shape
from megatune.parallel.tensor import Linear, LowRank


@dataclass(frozen=True)
class HfModule:
    """A linear layer of the Hugging Face model: its module `path` and the `pieces` that it holds of our weight."""

    path: str
    pieces: tuple[Piece, ...]

    @property
    def target(self) -> str:
        """The name that `method.targets` uses: the last part of the path, for example q_proj."""
        return self.path.rpartition(".")[2]

    @property
    def parts(self) -> tuple[str | None, ...]:
        return tuple(piece.part for piece in self.pieces)


class LoraAdapter(nn.Module):
    """scale * B A beside a `Linear`, which calls it in place of its own product.

    Parameters, always fp32: `lora_a` [modules * rank, in], the A matrices one after the other; `lora_b` [rows of the
    modules, rank] in the weight's own row order; under tensor parallelism the slices that `shard_specs` says.
    `modules`: the Hugging Face modules that have an adapter, in the order of our parts. `name`: the layer's global
    name. `dropout` acts on the adapter's input; its mask depends on that name and on the tokens' `Segments`.
    """

    def __init__(
        self,
        linear: Linear,
        modules: tuple[HfModule, ...],
        rank: int,
        scale: float,
        dropout: float,
        name: str,
    ) -> None:
        super().__init__()
        self.hf_modules, self.rank, self.scale, self.dropout = modules, rank, scale, dropout
        self.fused = _adapted_rows(linear, modules)
        # lora_b has the weight's own rows in their order where one module is all of it.
        self._rows = linear.fused if self.fused is None else self.fused
        self._shard = linear.shard
        self.layout = self._layout(linear.fused, linear.out_features)
        held = linear.out_features if linear.shard == "row" else linear.weight.shape[0]
        self.local_layout = self._layout(linear.local_fused, held)
        self.a_shape = (len(modules) * rank, linear.in_features)
        self.b_shape = (self.layout.adapted_rows, rank)
        self._uid = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        if dropout:
            # Not for the compiler of layers: to it every key is another program. (As a decorator of the class it
            # would load the compiler, which takes 2 s, for everyone.)
            self._dropped = torch.compiler.disable(self._dropped)
        options = {"dtype": torch.float32, "device": linear.weight.device}
        a, b = (local_shape(spec, linear.cut) for spec in self.shard_specs(""))
        self.lora_a = nn.Parameter(torch.empty(a, **options))
        self.lora_b = nn.Parameter(torch.empty(b, **options))

    def _layout(self, fused: Fused | None, rows: int) -> ops.LoraLayout:
        if self.fused is None:
            return ops.LoraLayout.whole(rows)
        return ops.LoraLayout.of(fused.parts, fused.groups, self.fused.names)

    def forward(self, x: Tensor, linear: Linear, segments: Segments | None = None) -> Tensor:
        """The layer's product with W + scale * B A, the second of a dropped x; `segments`: of the tokens."""
        dropped = self._dropped(x, linear, segments) if self.training and self.dropout else None
        change = LowRank(self.lora_a, self.lora_b, self.local_layout, self.scale, dropped)
        return linear.product(x, change)

    def _dropped(self, x: Tensor, linear: Linear, segments: Segments | None) -> Tensor:
        rows, first_column = linear.place(segments)
        return ops.keyed_dropout(x, self.dropout, self.key(segments), rows, first_column)

    def key(self, segments: Segments | None) -> int:
        """Names this adapter's dropout of these tokens' micro-batch."""
        return self._uid ^ (0 if segments is None else segments.key)

    def shard_specs(self, name: str) -> list[ShardSpec]:
        """Global shape and slicing of lora_a and lora_b; `name`: the adapter's global name.

        B is cut with a column layer's outputs and A with a row layer's inputs; the other one's gradient is a partial
        sum, over this process's tokens or over its part of the product.
        """
        column, row = self._shard == "column", self._shard == "row"
        return [
            ShardSpec(f"{name}.lora_a", self.a_shape, 1 if row else None, partial=not row),
            ShardSpec(
                f"{name}.lora_b",
                self.b_shape,
                0 if column else None,
                self._rows if column else None,
                partial=not column,
            ),
        ]

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        """The weight's change [out, in] in fp32, from whole (not sharded) values of lora_a and lora_b."""
        return self.layout.scatter(b.float()) @ a.float() * self.scale

    def extra_repr(self) -> str:
        targets = ", ".join(module.target for module in self.hf_modules)
        return f"{targets}, rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


def lora(model: nn.Module, method: LoraMethod, chosen: Mapping[str, tuple[HfModule, ...]]) -> None:
    """Freeze `model` and give each of the `chosen` linear layers that it holds a `LoraAdapter`, layers of experts an
    `ExpertLora`; the values come with the weights."""
    held = {name for name, _ in model.named_modules()}
    attach_lora(
        model,
        {name: modules for name, modules in chosen.items() if name in held},
        rank=method.rank,
        scale=lora_scale(method),
        dropout=method.dropout,
    )


def choose(model: nn.Module, method: LoraMethod) -> dict[str, tuple[HfModule, ...]]:
    """The linear layers of a whole model (with all pipeline stages) that `method` targets, by global name.

    Raises ConfigError, listing the choices, for a target that the model does not have.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Linear | GroupedLinear) and name.startswith("layers.")
    }
    modules = {name: hf_modules(model, name) for name in linears}
    choices = list(dict.fromkeys(module.target for found in modules.values() for module in found))
    wanted = choices if method.targets == "all-linear" else method.targets
    for target in wanted:
        if target not in choices:
            raise ConfigError(
                f"method.targets: {target!r} is no linear layer of this model; choose from {', '.join(choices)}, or "
                "all-linear"
            )
    return {name: tuple(m for m in found if m.target in wanted) for name, found in modules.items()}


def attach_lora(
    model: nn.Module,
    chosen: Mapping[str, tuple[HfModule, ...]],
    *,
    rank: int,
    scale: float,
    dropout: float,
) -> None:
    """Freeze `model` and adapt the given modules (by the global name of the linear layer that holds them)."""
    model.requires_grad_(False)
    for name, modules in chosen.items():
        if modules:
            linear = model.get_submodule(name)
            if isinstance(linear, GroupedLinear):
                attach_expert_lora(linear, name, modules, rank=rank, scale=scale, dropout=dropout)
            else:
                linear.adapter = LoraAdapter(linear, modules, rank, scale, dropout, name)


def hf_modules(model: nn.Module, name: str) -> list[HfModule]:
    """The Hugging Face modules that a linear layer, by its global name, is made of; in the order of our parts."""
    pieces = family_named(model.spec.family).name_map(model.spec)[f"{name}.weight"]
    by_path: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_path.setdefault(piece.hf_name.removesuffix(".weight"), []).append(piece)
    return [HfModule(path, tuple(found)) for path, found in by_path.items()]


def lora_scale(method: LoraMethod) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv:2312.03732)."""
    return method.alpha / (method.rank**0.5 if method.rslora else method.rank)


def _adapted_rows(linear: Linear, modules: tuple[HfModule, ...]) -> Fused | None:
    """Row order of lora_b: the weight's own with only the adapted parts. None where one module is the whole weight."""
    parts = [part for module in modules for part in module.parts]
    if linear.fused is None or parts == [None]:
        return None
    if len(modules) == 1 and set(parts) == set(linear.fused.names) and len(parts) > 1:
        return None
    return Fused(tuple(item for item in linear.fused.parts if item[0] in parts), linear.fused.groups)
