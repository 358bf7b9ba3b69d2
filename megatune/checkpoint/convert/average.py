"""The weighted mean of several checkpoints of one model, as a Hugging Face folder; portion by portion."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatune.checkpoint.convert.base import Opened, Options
from megatune.checkpoint.convert.compare import open_whole
from megatune.checkpoint.convert.hf import HfTarget
from megatune.checkpoint.convert.names import cast
from megatune.checkpoint.sources import TensorSource
from megatune.errors import CheckpointError, ConfigError


class Averaged:
    """A `TensorSource`: the weighted mean of the same tensors of others, in fp64 and then in the first one's dtype."""

    def __init__(self, sources: Sequence[TensorSource], weights: Sequence[float]) -> None:
        self._sources, self._weights = sources, weights
        first = sources[0]
        for other in sources[1:]:
            odd = sorted(first.names() ^ other.names())
            if odd:
                raise CheckpointError(
                    f"{odd[0]} is in only one of {first} and {other}; are they of one model?"
                )
            for name in sorted(first.names()):
                if first.shape(name) != other.shape(name):
                    raise CheckpointError(
                        f"{name} has shape {list(first.shape(name))} in {first} and {list(other.shape(name))} in "
                        f"{other}; are they of one model?"
                    )

    def __str__(self) -> str:
        return f"the mean of {', '.join(map(str, self._sources))}"

    def names(self) -> set[str]:
        return self._sources[0].names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._sources[0].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._sources[0].dtype(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        total: Tensor | None = None
        for source, weight in zip(self._sources, self._weights, strict=True):
            part = source.rows(name, start, stop).double().mul_(weight)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total.to(self.dtype(name))


def ema_weights(count: int, decay: float) -> list[float]:
    """Weights of checkpoints, oldest first, in their exponential moving average: it starts at the first one and moves
    by 1 - `decay` to each of the others. They sum to 1."""
    if not 0 <= decay < 1:
        raise ConfigError(f"decay {decay}: must be at least 0 and less than 1")
    return [
        decay ** (count - 1),
        *((1 - decay) * decay ** (count - 1 - number) for number in range(1, count)),
    ]


def mean_weights(count: int, given: Sequence[float] | None) -> list[float]:
    """`given`, or ones, scaled to sum to 1."""
    if given is not None and len(given) != count:
        raise ConfigError(f"{len(given)} weights for {count} checkpoints: give one for each")
    found = list(given) if given is not None else [1.0] * count
    total = math.fsum(found)
    if not all(map(math.isfinite, found)) or not math.isfinite(total) or total == 0:
        raise ConfigError(f"weights {', '.join(map(str, found))}: must be numbers whose sum is not zero")
    return [weight / total for weight in found]


def average(paths: Sequence[Path], destination: Path, weights: Sequence[float], options: Options) -> Opened:
    """Write the mean of the weights of `paths` (any formats, one model) to the new folder `destination`: config and
    tokenizer are the first one's, optimizer states are left out. It appears whole. Returns what was written."""
    if len(paths) < 2:
        raise ConfigError("one checkpoint has no mean: give two or more")
    if destination.exists():
        raise CheckpointError(f"{destination}: is there already; name another folder")
    opened = [open_whole(path, options) for path in paths]
    first = opened[0]
    for other in opened[1:]:
        if other.hf_config.get("model_type") != first.hf_config.get("model_type"):
            raise CheckpointError(
                f"{other.path}: is a {other.hf_config.get('model_type')} model and {first.path} a "
                f"{first.hf_config.get('model_type')} model"
            )
    mean = Averaged([one.weights for one in opened], weights)
    made = cast(replace(first, weights=mean, optimizer={}), options.dtype)
    destination.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        target = HfTarget(made, options)
        for job in target.jobs():
            target.make(job, folder)
        target.finish(folder)
        folder.chmod(0o755)
        folder.rename(destination)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return made
