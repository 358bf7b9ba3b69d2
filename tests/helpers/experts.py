"""A mixture-of-experts layer by itself: its specs, its values, adapters with both factors non-zero."""

from __future__ import annotations

import torch
from torch import Tensor

from megatune.adapters.expert_lora import attach_expert_lora
from megatune.adapters.lora import HfModule
from megatune.models.families.base import Piece
from megatune.models.layout import shard_specs
from megatune.models.moe import MoE
from megatune.models.spec import DecoderSpec, LayerSpec, MoESpec
from megatune.parallel import World
from megatune.parallel.shard import ShardSpec
from tests.helpers.whole import slice_of

HIDDEN = 12


def spec_of(moe: MoESpec) -> DecoderSpec:
    """A model of one layer with these experts, of which only the feed-forward block is of interest."""
    layer = (LayerSpec(rope=None, moe=True),)
    return DecoderSpec("mixtral", 8, HIDDEN, 16, 2, 2, 6, layer, (), 64, moe=moe)


def layer_specs(layer: MoE, spec: DecoderSpec) -> dict[str, ShardSpec]:
    """Of each of the layer's tensors, by its name in the layer."""
    at = "layers.0.mlp."
    found = {name.removeprefix(at): one for name, one in shard_specs(spec).items() if name.startswith(at)}
    for name in ("gate_up", "down"):
        adapter = getattr(layer.experts, name).adapter
        if adapter is not None:
            found |= {one.name: one for one in adapter.shard_specs(f"experts.{name}.adapter")}
    return found


def adapt(layer: MoE, gate_parts: tuple[str | None, ...] = ("gate", "up"), dropout: float = 0.0) -> None:
    """Adapters of rank 2 on both projections."""
    for name, parts in (("gate_up", gate_parts), ("down", (None,))):
        modules = tuple(HfModule(f"experts.0.{part or name}", (Piece("", part),)) for part in parts)
        linear = getattr(layer.experts, name)
        attach_expert_lora(linear, name, modules, rank=2, scale=0.7, dropout=dropout)


def fill(layer: MoE, spec: DecoderSpec, world: World, seed: int = 0) -> dict[str, ShardSpec]:
    """Random values in fp64, the same globally whatever the world; returns the specs."""
    specs = layer_specs(layer, spec)
    layer.double()
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    assert state.keys() == specs.keys()
    generator = torch.Generator().manual_seed(seed)
    for name, one in sorted(specs.items()):
        whole = torch.randn(one.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            state[name].copy_(slice_of(one, 0.4 * whole, world.cut))
    return specs


def by_hand(layer: MoE, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """The layer's formula for one process without adapters, token by token; `experts`: E for a dropped choice."""
    rows = []
    for token, chosen, weight in zip(x, experts.tolist(), weights, strict=True):
        total = torch.zeros_like(token)
        for expert, factor in zip(chosen, weight, strict=True):
            if expert < layer.spec.num_experts:
                total = total + factor * one_expert(layer, token, expert)
        rows.append(total)
    y = torch.stack(rows) if rows else x.clone()
    if layer.shared is not None:
        y = y + gated(x @ layer.shared.gate_up.weight.t()) @ layer.shared.down.weight.t()
    return y


def one_expert(layer: MoE, x: Tensor, expert: int) -> Tensor:
    up, down = layer.experts.gate_up, layer.experts.down
    inner = x @ up.weight[expert].t() + (0 if up.bias is None else up.bias[expert])
    inner = gated(inner, layer.spec.clamped)
    return inner @ down.weight[expert].t() + (0 if down.bias is None else down.bias[expert])


def gated(pairs: Tensor, clamped: bool = False) -> Tensor:
    gate, up = pairs[..., 0::2], pairs[..., 1::2]
    if clamped:
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return gate * torch.sigmoid(gate) * up
