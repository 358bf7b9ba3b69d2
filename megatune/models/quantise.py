"""The base of QLoRA (arXiv:2305.14314): frozen linear layers of a decoder in 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from megatune.models.decoder import Decoder
from megatune.ops import FrozenWeight
from megatune.ops.quant import Kind
from megatune.parallel.shard import Parts, parts_of_local
from megatune.parallel.tensor import Linear


def quantise(model: nn.Module, kind: Kind) -> None:
    """Let the frozen weights of the layers' linear layers be kept as `kind`, in place; on meta, before any sharding,
    after dtypes are set. They are no parameters from then on: ZeRO leaves them whole, checkpoints leave them out.

    Each process quantises its own slice. Rows stand in the order of the fused weights; blocks are within rows where
    the inputs held here are a multiple of 64.
    """
    for name, linear in list(model.named_modules()):
        if isinstance(linear, Linear) and name.startswith("layers.") and not linear.weight.requires_grad:
            weight = linear.weight
            del linear.weight
            with torch.device(weight.device):
                linear.weight = FrozenWeight(kind, (weight.shape[0], weight.shape[1]), weight.dtype)


def frozen_weights(model: nn.Module) -> dict[str, FrozenWeight]:
    """The quantised weights of a model by the global names of the parameters that they are."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FrozenWeight)}


class FrozenParts(Mapping[str, Parts]):
    """The quantised weights that this process holds, each made dense when it is asked for, as `Parts`: for exports."""

    def __init__(self, model: Decoder) -> None:
        self._model, self._weights = model, frozen_weights(model)
        self._specs = model.shard_specs()

    def __len__(self) -> int:
        return len(self._weights)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __getitem__(self, name: str) -> Parts:
        weight = self._weights[name]
        return self._parts(name, weight.dense(weight.dtype))

    def fill(self, read: Callable[[str, Parts], None]) -> None:
        """Quantise all: `read` fills the parts of one dense weight after the other, which exists for that long."""
        for name, weight in self._weights.items():
            values = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            read(name, self._parts(name, values))
            weight.keep(values)

    def _parts(self, name: str, values: torch.Tensor) -> Parts:
        world, spec = self._model.world, self._specs[name]
        is_first = world.fsdp.is_first and world.dp_replicate.is_first
        writes = is_first and (spec.tensor_dim is not None or world.tp.is_first)
        return parts_of_local(spec, world.cut, values, writes)
