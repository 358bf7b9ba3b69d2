"""Global values of a model's parameters, put into the slices that a process holds; a packed batch."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from megatune.models import Decoder
from megatune.ops import Segments, Targets
from megatune.parallel.shard import Cut, ShardSpec, local_boxes


def random_state(specs: Iterable[ShardSpec], seed: int = 0) -> dict[str, Tensor]:
    """A global value in fp64 for each parameter, from seed and name alone: norm weights around 1, the rest small."""
    state = {}
    for spec in specs:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{spec.name}".encode()))
        noise = torch.randn(spec.shape, generator=generator, dtype=torch.float64)
        is_norm = len(spec.shape) == 1 and spec.name.endswith("norm.weight")
        state[spec.name] = (1.0 if is_norm else 0.0) + 0.2 * noise
    return state


def load_whole(model: Decoder, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float64) -> None:
    """Fill a model on meta, whatever it holds under its layout, from global values: on the CPU, in `dtype`."""
    model.to(dtype).to_empty(device="cpu")
    specs = model.shard_specs()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.copy_(slice_of(specs[name], state[name], model.world.cut))


def slice_of(spec: ShardSpec, whole: Tensor, cut: Cut) -> Tensor:
    """A process's local tensor of the global one (a copy where it is in several parts)."""
    parts = [box.of(whole) for box in local_boxes(spec, cut)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, spec.tensor_dim)


def packed_batch(vocab_size: int) -> tuple[Tensor, Segments, Targets]:
    """32 tokens in three documents, about half of them scored."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocab_size, (32,), generator=generator)
    segments = replace(Segments.from_lengths((7, 10, 15)), key=77)
    index = (segments.positions[1:] > 0).nonzero().flatten()[::2]
    return tokens, segments, Targets(index, tokens[index + 1])
