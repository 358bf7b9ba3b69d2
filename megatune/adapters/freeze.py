"""Train a part of a model's own weights: by layer or by name."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from megatune.config.schema import FreezeMethod
from megatune.errors import ConfigError


def names(model: nn.Module, method: FreezeMethod) -> set[str]:
    """The parameters of a whole model that train: the last `method.last_layers` decoder layers and what matches
    `method.modules`.

    Raises ConfigError where there are not that many layers or a pattern matches no parameter.
    """
    layers = model.spec.num_layers
    if method.last_layers > layers:
        raise ConfigError(
            f"method.last_layers: {method.last_layers}, but the model has {layers} layers; give {layers} or less"
        )
    trained = {str(index) for index in range(layers - method.last_layers, layers)}
    every = [name for name, _ in model.named_parameters()]
    for pattern in method.modules:
        if not any(fnmatchcase(name, pattern) for name in every):
            raise ConfigError(
                f"method.modules: {pattern!r} matches no parameter; names are for example {_examples(every)}"
            )
    found = set()
    for name in every:
        room, _, rest = name.partition(".")
        in_last_layers = room == "layers" and rest.partition(".")[0] in trained
        if in_last_layers or any(fnmatchcase(name, pattern) for pattern in method.modules):
            found.add(name)
    return found


def _examples(names: list[str]) -> str:
    """Names of the first layer's parameters and of those outside the layers."""
    first = next((name.split(".")[1] for name in names if name.startswith("layers.")), "0")
    return ", ".join(n for n in names if not n.startswith("layers.") or n.startswith(f"layers.{first}."))
