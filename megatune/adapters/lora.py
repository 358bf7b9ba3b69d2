"""LoRA (arXiv:2106.09685): low-rank adapters beside frozen linear layers, also on parts of fused weights.

What a target is follows from the Hugging Face names: a module there is one adapter, as in PEFT, whether it is a part of
our fused weight (`q_proj` in `attn.qkv`) or all of it (Phi-3's `qkv_proj`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatune import ops
from megatune.config.schema import LoraMethod
from megatune.errors import ConfigError
from megatune.models.families.base import Piece
from megatune.models.registry import family_named
from megatune.parallel.shard import Fused
from megatune.parallel.tensor import Linear


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
    modules, rank] in the weight's own row order. `modules`: the Hugging Face modules that have an adapter, in the
    order of our parts. `dropout` acts on the adapter's input, with torch's default generator.
    """

    def __init__(
        self, linear: Linear, modules: tuple[HfModule, ...], rank: int, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.hf_modules, self.rank, self.scale, self.dropout = modules, rank, scale, dropout
        self.fused = _adapted_rows(linear, modules)
        if self.fused is None:
            self.layout = ops.LoraLayout.whole(linear.out_features)
        else:
            self.layout = ops.LoraLayout.of(linear.fused.parts, linear.fused.groups, self.fused.names)
        options = {"dtype": torch.float32, "device": linear.weight.device}
        self.lora_a = nn.Parameter(torch.empty(len(modules) * rank, linear.in_features, **options))
        self.lora_b = nn.Parameter(torch.empty(self.layout.adapted_rows, rank, **options))

    def forward(self, x: Tensor, linear: Linear) -> Tensor:
        """x [T, in] -> linear(x) + scale * dropout(x) A^T B^T, [T, out]."""
        dropped = F.dropout(x, self.dropout) if self.training and self.dropout else None
        return ops.lora_linear(
            x, linear.weight, linear.bias, self.lora_a, self.lora_b, self.layout, self.scale, dropped
        )

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        """The weight's change [out, in] in fp32, from whole (not sharded) values of lora_a and lora_b."""
        return self.layout.scatter(b.float()) @ a.float() * self.scale

    def extra_repr(self) -> str:
        targets = ", ".join(module.target for module in self.hf_modules)
        return f"{targets}, rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


def lora(model: nn.Module, method: LoraMethod) -> None:
    """Freeze `model` and give each targeted linear layer a `LoraAdapter`; the values come with the weights.

    Raises ConfigError, listing the choices, for a target that the model does not have.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Linear) and name.startswith("layers.")
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
    attach_lora(
        model,
        {name: tuple(m for m in found if m.target in wanted) for name, found in modules.items()},
        rank=method.rank,
        scale=lora_scale(method),
        dropout=method.dropout,
    )


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
            linear.adapter = LoraAdapter(linear, modules, rank, scale, dropout)


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
