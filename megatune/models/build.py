"""Models on the meta device, the dtypes of their parameters, and random weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from megatune.models.decoder import Decoder
from megatune.models.spec import DecoderSpec
from megatune.parallel.shard import Box, Parts, parts_of_local
from megatune.parallel.stages import Stage
from megatune.parallel.world import World

_BLOCK_ROWS = 1024  # random numbers are drawn in blocks of rows, each from a generator of its own


def build(spec: DecoderSpec, world: World | None = None, stages: Sequence[Stage] | None = None) -> Decoder:
    """A model without memory: all parameters on the meta device. `world`: the layout whose slices this process holds
    (default: all of it); `stages`: the pipeline stages that it holds (default: the one there is)."""
    with torch.device("meta"):
        return Decoder(spec, world, stages)


def set_dtypes(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Trainable parameters to fp32 (master weights), frozen ones to `compute_dtype`. On meta, before sharding. Buffers
    keep their dtype."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else compute_dtype)


def whole_weights(model: Decoder) -> dict[str, Parts]:
    """All parameters of a model that no ZeRO stage shards, as checkpoints and loading see them: for chat, tools, tests.
    Of the processes that hold the same slice, one `writes` it."""
    world, tensors = model.world, {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = {}
    for name, spec in model.shard_specs().items():
        shard, tensor = (world.efsdp, world.etp) if spec.expert else (world.fsdp, world.tp)
        writes = (
            shard.is_first
            and world.dp_replicate.is_first
            and (spec.tensor_dim is not None or tensor.is_first)
        )
        if name == "embed.weight":  # the copy of a tied head is not written again
            writes = writes and model.stages[0].is_first
        found[name] = parts_of_local(spec, world.cut, tensors[name].detach(), writes)
    return found


def materialise_random(
    model: Decoder, seed: int, device: torch.device | str, dtype: torch.dtype | None = None
) -> None:
    """Give a model on meta memory on `device` and random weights (`fill_random`): for benchmarks and tests.

    `dtype`: default the parameters' own. Only the base model's parameters are filled; adapters fill their own.
    """
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    fill_random(whole_weights(model), model.spec, seed)


@torch.no_grad()
def fill_random(weights: Mapping[str, Parts], spec: DecoderSpec, seed: int) -> None:
    """Random values for what this process holds of a base model; adapters are left as they are.

    The values depend on seed, parameter name and kind of device, not on the layout. Matrices: normal, standard
    deviation 0.02, those that write to the residual stream 0.02 / sqrt(2 * layers) (GPT-2). Norm weights: an effective
    1. Biases: 0.
    """
    for name, parts in weights.items():
        if ".adapter." in name:
            continue
        for box, tensor in parts.parts:
            _initialise(name, spec, parts.shape, box, tensor, seed)


def _initialise(
    name: str, spec: DecoderSpec, shape: tuple[int, ...], box: Box, tensor: Tensor, seed: int
) -> None:
    kind = name.rpartition(".")[2]
    if kind in ("bias", "correction"):
        tensor.zero_()
    elif len(shape) == 1 and kind != "sinks":
        tensor.fill_(1.0 - spec.norm_offset)
    else:
        writes_residual = name.endswith(("attn.out.weight", ".down.weight"))
        deviation = 0.02 / math.sqrt(2 * spec.num_layers) if writes_residual else 0.02
        _normal(f"{seed}/{name}", deviation, shape, box, tensor)


def _normal(key: str, deviation: float, shape: tuple[int, ...], box: Box, tensor: Tensor) -> None:
    """Elements `box` of the random tensor of `shape`, into `tensor`. Experts' matrices count as one of all rows."""
    if len(shape) == 3:
        for place in range(box.shape[0]):
            first = (box.offset[0] + place) * shape[1] + box.offset[1]
            rows = Box((first, box.offset[2]), box.shape[1:])
            _normal(key, deviation, (shape[0] * shape[1], shape[2]), rows, tensor[place])
        return
    first, end = box.offset[0], box.offset[0] + box.shape[0]
    generator = torch.Generator(tensor.device)
    for block in range(first // _BLOCK_ROWS, -(-end // _BLOCK_ROWS)):
        digest = hashlib.sha256(f"{key}/{block}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        start = block * _BLOCK_ROWS
        values = torch.randn(_BLOCK_ROWS, *shape[1:], generator=generator, device=tensor.device)
        low, high = max(start, first), min(start + _BLOCK_ROWS, end)
        held = Box((low - start, *box.offset[1:]), (high - low, *box.shape[1:])).of(values)
        tensor[low - first : high - first] = held * deviation
