"""Models on the meta device, the dtypes of their parameters, and random weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from megatune.models.decoder import Decoder
from megatune.models.spec import DecoderSpec
from megatune.parallel.stages import Stage
from megatune.parallel.world import World

_BLOCK_ROWS = 1024  # random numbers are drawn in blocks of rows, each from a generator of its own


def build(spec: DecoderSpec, world: World | None = None, stages: Sequence[Stage] | None = None) -> Decoder:
    """A model without memory: all parameters on the meta device. `world`: the layout whose slices this process holds
    (default: all of it); `stages`: the pipeline stages that it holds (default: the one there is)."""
    with torch.device("meta"):
        return Decoder(spec, world, stages)


def set_dtypes(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Trainable parameters to fp32 (master weights), frozen ones to `compute_dtype`. On meta, before sharding."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else compute_dtype)


def materialise_random(
    model: Decoder, seed: int, device: torch.device | str, dtype: torch.dtype | None = None
) -> None:
    """Give a model on meta, sharded or not, memory on `device` and random weights: for benchmarks and tests.

    The values depend on seed, parameter name and kind of device, not on the sharding. `dtype`: default the
    parameters' own. Only the base model's parameters are filled; adapters fill their own.
    """
    if dtype is not None:
        model.to(dtype)
    model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    for name in model.shard_specs():
        with torch.no_grad():
            local, first_row = _local(parameters[name])
            initialise(name, model.spec, local, seed, first_row)


def initialise(name: str, spec: DecoderSpec, rows: Tensor, seed: int, first_row: int = 0) -> None:
    """Fill `rows`, the rows from `first_row` on of parameter `name`, in place.

    Matrices: normal, standard deviation 0.02, those that write to the residual stream 0.02 / sqrt(2 * layers)
    (GPT-2). Norm weights: an effective 1. Biases: 0.
    """
    kind = name.rpartition(".")[2]
    if kind == "bias":
        rows.zero_()
    elif rows.dim() == 1:
        rows.fill_(1.0 - spec.norm_offset)
    else:
        writes_residual = name.endswith(("attn.out.weight", "mlp.down.weight"))
        deviation = 0.02 / math.sqrt(2 * spec.num_layers) if writes_residual else 0.02
        _normal(rows, deviation, f"{seed}/{name}", first_row)


def _normal(rows: Tensor, deviation: float, key: str, first_row: int) -> None:
    end = first_row + rows.shape[0]
    generator = torch.Generator(rows.device)
    for block in range(first_row // _BLOCK_ROWS, -(-end // _BLOCK_ROWS)):
        digest = hashlib.sha256(f"{key}/{block}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        start = block * _BLOCK_ROWS
        values = torch.randn(_BLOCK_ROWS, *rows.shape[1:], generator=generator, device=rows.device)
        low, high = max(start, first_row), min(start + _BLOCK_ROWS, end)
        rows[low - first_row : high - first_row] = values[low - start : high - start] * deviation


def _local(parameter: Tensor) -> tuple[Tensor, int]:
    """This process's rows of a parameter, and the first of them (a DTensor sharded along dimension 0, or whole)."""
    if not isinstance(parameter, DTensor):
        return parameter, 0
    start, count = 0, parameter.shape[0]
    for dim, placement in enumerate(parameter.placements):
        if placement.is_replicate():
            continue
        if placement != Shard(0):
            raise ValueError(f"random weights: placement {placement} is not supported, only Shard(0)")
        chunk = -(-count // parameter.device_mesh.size(dim))
        before = min(chunk * parameter.device_mesh.get_local_rank(dim), count)
        start, count = start + before, min(chunk, count - before)
    return parameter.to_local(), start
