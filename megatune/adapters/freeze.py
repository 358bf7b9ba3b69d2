"""Train a part of a model's own weights: by layer or by name."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from megatune.config.schema import FreezeMethod
from megatune.errors import ConfigError


def freeze(model: nn.Module, method: FreezeMethod) -> None:
    """Let only the last `method.last_layers` decoder layers and the parameters that match `method.modules` train.

    Raises ConfigError where there are not that many layers or a pattern matches no parameter.
    """
    layers = model.spec.num_layers
    if method.last_layers > layers:
        raise ConfigError(
            f"method.last_layers: {method.last_layers}, but the model has {layers} layers; give {layers} or less"
        )
    trained = {str(index) for index in range(layers - method.last_layers, layers)}
    names = [name for name, _ in model.named_parameters()]
    for pattern in method.modules:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"method.modules: {pattern!r} matches no parameter; names are for example {_examples(names)}"
            )
    for name, parameter in model.named_parameters():
        room, _, rest = name.partition(".")
        in_last_layers = room == "layers" and rest.partition(".")[0] in trained
        parameter.requires_grad_(in_last_layers or any(fnmatchcase(name, p) for p in method.modules))


def _examples(names: list[str]) -> str:
    """Names of the first layer's parameters and of those outside the layers."""
    first = next((name.split(".")[1] for name in names if name.startswith("layers.")), "0")
    return ", ".join(n for n in names if not n.startswith("layers.") or n.startswith(f"layers.{first}."))
