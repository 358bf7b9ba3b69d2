"""What each process of a layout holds of a model, made by hand: without models, process groups or processes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megatune.config.layout import Layout
from megatune.models import Decoder, whole_weights
from megatune.parallel.shard import Parts, ShardSpec, local_boxes, local_shape, parts_of_flat
from megatune.parallel.stages import cut
from megatune.parallel.world import Axis, World

_VIEWS = (
    ("pp", "dp_replicate", "fsdp", "tp"),
    ("pp", "dp_replicate", "dp_shard", "cp", "tp"),
    ("pp", "dp_replicate", "efsdp", "ep", "etp"),
)


def worlds(**sizes: int) -> list[World]:
    """The worlds of all processes of `Layout(**sizes)`."""
    layout = Layout(**sizes)
    found = []
    for rank in range(layout.world_size):
        axes: dict[str, Axis] = {}
        for names in _VIEWS:
            rest = rank
            for name in reversed(names):
                size = layout.sizes()[name]
                axes[name] = Axis(name, size, rest % size)
                rest //= size
        found.append(World(rank, layout.world_size, rank, torch.device("cpu"), layout, **axes))
    return found


def held(specs: Mapping[str, ShardSpec], world: World, layers: int) -> dict[str, ShardSpec]:
    """The parameters of this process's stage, layers dealt out evenly; the last stage has a tied embedding too."""
    size = world.pp.size
    stage = cut([layers // size + (number < layers % size) for number in range(size)])[world.pp.rank]
    found = {}
    for name, spec in specs.items():
        room, _, rest = name.partition(".")
        if room == "layers":
            mine = int(rest.partition(".")[0]) in stage.layers
        elif room == "embed":
            mine = stage.is_first or (stage.is_last and "head.weight" not in specs)
        else:
            mine = stage.is_first if room == "positions" else stage.is_last
        if mine:
            found[name] = spec
    return found


def values_of(model: Decoder) -> dict[str, Tensor]:
    """The global tensors of a model of one process."""
    return {name: parts.parts[0][1] for name, parts in whole_weights(model).items()}


def local_of(spec: ShardSpec, world: World, whole: Tensor) -> Tensor:
    """This process's slice of a global tensor under tensor and expert parallelism."""
    return torch.cat([box.of(whole) for box in local_boxes(spec, world.cut)], spec.tensor_dim or 0)


def shards(
    specs: Mapping[str, ShardSpec],
    world: World,
    values: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Parts]:
    """What this process holds under ZeRO: of its slice of each tensor, flattened, a contiguous piece of odd size.

    `values`: the global tensors; None: zeros, of `dtype`.
    """
    found = {}
    for name, spec in specs.items():
        fsdp, tensor = (world.efsdp, world.etp) if spec.expert else (world.fsdp, world.tp)
        count = math.prod(local_shape(spec, world.cut))
        share = -(-count // fsdp.size)
        share += 1 - share % 2 if fsdp.size > 1 else 0
        start = min(fsdp.rank * share, count)
        length = min(share, count - start)
        if values is None:
            flat = torch.zeros(length, dtype=dtype)
        else:
            flat = local_of(spec, world, values[name]).reshape(-1)[start : start + length].clone()
        writes = world.dp_replicate.is_first and (spec.tensor_dim is not None or tensor.is_first)
        writes = writes and (name != "embed.weight" or world.pp.is_first)
        found[name] = parts_of_flat(spec, world.cut, flat, start, writes)
    return found


def check(weights: Mapping[str, Parts], values: Mapping[str, Tensor]) -> int:
    """Every part is bit for bit that of the global tensor; returns how many elements there are."""
    for name, parts in weights.items():
        assert parts.shape == values[name].shape, name
        for box, tensor in parts.parts:
            assert torch.equal(tensor, box.of(values[name])), (name, box)
    return sum(box.numel for parts in weights.values() for box, _ in parts.parts)
