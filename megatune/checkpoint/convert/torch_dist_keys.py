"""Where Megatron-Core's `torch_dist` keeps each parameter of a model: keys, axes of layers and experts.

Layers that are all alike are one tensor, stacked along dimension 0 (`decoder.layers.mlp.linear_fc2.weight`); otherwise
each has its number in the key (`decoder.layers.7....`). Experts are an axis of their own, after that of the layers, and
their key says `experts` twice. Keys are those of Transformer Engine's layers; what Megatron's own layers call otherwise
is found too. Nothing depends on the parallel layout. Source: megatron/core/transformer/{transformer_block,mlp,moe/
experts}.py `sharded_state_dict` (0.16.1).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatune.checkpoint.convert.dcp_files import DcpFolder
from megatune.checkpoint.convert.megatron_names import MegatronTable, MegatronTensor
from megatune.errors import CheckpointError

_LAYERS = "decoder.layers."
# Other keys that the same parameter has where layers are Megatron's own, or experts follow the norm.
_ALIASES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
}
_ALIASES |= {other: name for name, other in _ALIASES.items()}
# Layers that keep an `_extra_state` with Transformer Engine (mostly nothing, or scales of fp8).
_STATEFUL = (
    "self_attention.linear_qkv",
    "self_attention.linear_q_proj",
    "self_attention.linear_q_down_proj",
    "self_attention.linear_q_up_proj",
    "self_attention.linear_kv_down_proj",
    "self_attention.linear_kv_up_proj",
    "self_attention.linear_proj",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "input_layernorm",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "mlp.shared_experts.linear_fc1",
    "mlp.shared_experts.linear_fc2",
    "mlp.experts.linear_fc1",
    "mlp.experts.linear_fc2",
)
EXTRA = "._extra_state"
_DOUBLED = re.compile(r"^mlp\.experts\.")


@dataclass(frozen=True)
class Slot:
    """Where one parameter stands: box `lead` (layer, expert) of the tensor `key`, whose leading axes have the lengths
    `axes`. `second`: the key of the second half of its rows, where gate and up are stored apart."""

    key: str
    lead: tuple[int, ...]
    axes: tuple[int, ...]
    second: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,) if self.second is None else (self.key, self.second)

    def under(self, prefix: str) -> Slot:
        """The same with `prefix` before its keys."""
        second = None if self.second is None else prefix + self.second
        return Slot(prefix + self.key, self.lead, self.axes, second)


def is_uniform(table: MegatronTable) -> bool:
    """Whether Megatron stacks the layers of this model: they have all experts or none."""
    return len({layer.moe for layer in table.spec.layers}) == 1


def trained(table: MegatronTable) -> set[str]:
    """Names of what an optimizer trains: all but the routers' corrections."""
    return {name for name, tensor in table.tensors.items() if not tensor.fp32}


def slot_of(table: MegatronTable, tensor: MegatronTensor, within: str, stacked: bool) -> Slot:
    """Where `tensor`, called `within` in its layer, is stored."""
    if tensor.layer is None:
        return Slot(within, (), ())
    lead, axes = ((tensor.layer,), (table.spec.num_layers,)) if stacked else ((), ())
    if tensor.expert is not None:
        within = _DOUBLED.sub("mlp.experts.experts.", within)
        lead, axes = (*lead, tensor.expert), (*axes, table.spec.moe.num_experts)
    return Slot(f"{_LAYERS}{'' if stacked else f'{tensor.layer}.'}{within}", lead, axes)


def written_slot(table: MegatronTable, tensor: MegatronTensor) -> Slot:
    """Where it is written: as a training run with Transformer Engine's layers writes it."""
    return slot_of(table, tensor, tensor.within, is_uniform(table))


def slots_of(table: MegatronTable, tensor: MegatronTensor) -> Iterator[Slot]:
    """Everywhere that it may be, the likely places first."""
    names = [tensor.within, *([_ALIASES[tensor.within]] if tensor.within in _ALIASES else [])]
    for within in names:
        for stacked in (True, False):
            slot = slot_of(table, tensor, within, stacked)
            yield slot
            if tensor.halves:
                yield Slot(f"{slot.key}_w", slot.lead, slot.axes, f"{slot.key}_v")
    if tensor.expert is not None:
        # Experts as tensors of their own ("singleton local shards").
        rest = _DOUBLED.sub("", tensor.within)
        key = f"{_LAYERS}{tensor.layer}.mlp.experts.experts.{tensor.expert}.{rest}"
        yield Slot(key, (), ())
        yield Slot(f"{key}_w", (), (), f"{key}_v")


class StoredMegatron:
    """A model's parameters by `MegatronTensor.name` out of a `torch_dist` folder, vocabulary padded as it is there: a
    `TensorSource`. `prefixes`: what stands before the keys (`optimizer.state.exp_avg.`; of a mixture's optimizer, of
    which Megatron makes two, one of several). `states`: these are optimizer states, which may be stored in other shapes
    than the weights and then are not there. `keys`: what of the folder it uses."""

    def __init__(
        self,
        table: MegatronTable,
        folder: DcpFolder,
        prefixes: Sequence[str] = ("",),
        *,
        states: bool = False,
    ) -> None:
        self._folder, self._states = folder, states
        self._slots: dict[str, Slot] = {}
        there = folder.names()
        for name, tensor in table.tensors.items():
            slots = (slot.under(prefix) for slot in slots_of(table, tensor) for prefix in prefixes)
            found = (slot for slot in slots if there.issuperset(slot.keys) and self._fits(slot, tensor))
            slot = next(found, None)
            if slot is not None:
                self._slots[name] = slot
        self.keys = {key for slot in self._slots.values() for key in slot.keys}

    def __str__(self) -> str:
        return str(self._folder)

    def names(self) -> set[str]:
        return set(self._slots)

    def shape(self, name: str) -> tuple[int, ...]:
        slot = self._slots[name]
        first, *rest = self._folder.shape(slot.key)[len(slot.axes) :]
        return (first * (2 if slot.second else 1), *rest)

    def dtype(self, name: str) -> torch.dtype:
        return self._folder.dtype(self._slots[name].key)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        slot = self._slots[name]
        if slot.second is None:
            return self._box(slot.key, slot.lead, start, stop)
        half = self.shape(name)[0] // 2
        parts = [
            self._box(key, slot.lead, max(start - first, 0), min(stop - first, half))
            for key, first in ((slot.key, 0), (slot.second, half))
            if max(start - first, 0) < min(stop - first, half)
        ]
        return torch.cat(parts) if parts else self._box(slot.key, slot.lead, 0, 0)

    def _box(self, key: str, lead: tuple[int, ...], start: int, stop: int) -> Tensor:
        rest = self._folder.shape(key)[len(lead) + 1 :]
        offsets, sizes = (*lead, start, *(0 for _ in rest)), (*(1 for _ in lead), stop - start, *rest)
        box = self._folder.box(key, offsets, sizes)
        return box.view(stop - start, *rest)

    def _fits(self, slot: Slot, tensor: MegatronTensor) -> bool:
        """Whether the stored shape is the model's; CheckpointError where it is nearly."""
        found, wanted = self._folder.shape(slot.key), tensor.shape
        if slot.second is not None:
            wanted = (wanted[0] // 2, *wanted[1:])
        axes, own = found[: len(slot.axes)], found[len(slot.axes) :]
        grown = tensor.vocab and len(own) == len(wanted) and own[0] >= wanted[0] and own[1:] == wanted[1:]
        if axes == slot.axes and (own == wanted or grown):
            return True
        if self._states:
            return False
        raise CheckpointError(
            f"{self._folder}: {slot.key} has shape {list(found)} but the config asks for {[*slot.axes, *wanted]}; they "
            "do not belong together"
        )


def extra_states(table: MegatronTable) -> Iterator[str]:
    """Keys of the `_extra_state` entries that Megatron expects with its own layers and with Transformer Engine's."""
    spec, uniform = table.spec, is_uniform(table)
    layers: dict[int, set[str]] = {index: set() for index in range(spec.num_layers)}
    for tensor in table.tensors.values():
        if tensor.layer is not None:
            modules = {name.rpartition(".")[0] for name in (tensor.within, _ALIASES.get(tensor.within, ""))}
            layers[tensor.layer] |= modules.intersection(_STATEFUL)
    for layer, modules in layers.items():
        for module in sorted({*modules, "self_attention.core_attention"}):
            experts = spec.moe.num_experts if module.startswith("mlp.experts.") else None
            name = _DOUBLED.sub("mlp.experts.experts.", module)
            key = f"{_LAYERS}{'' if uniform else f'{layer}.'}{name}{EXTRA}"
            yield from (f"{key}/{shard}" for shard in _shards(layer, spec.num_layers, experts, uniform))
    yield f"decoder.final_layernorm{EXTRA}/shard_0_1"


def _shards(layer: int, layers: int, experts: int | None, uniform: bool) -> Iterable[str]:
    """`shard_<place>_<axes>` of each entry of one module."""
    if experts is None:
        return [f"shard_{layer}_{layers}" if uniform else "shard_0_1"]
    if uniform:
        return [f"shard_{layer}.{expert}_{layers}.{experts}" for expert in range(experts)]
    return [f"shard_{expert}_{experts}" for expert in range(experts)]
