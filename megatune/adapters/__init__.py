"""What is trained: the whole model, a part of it, or adapters beside it."""

from __future__ import annotations

from torch import nn

from megatune.adapters.freeze import names
from megatune.adapters.lora import LoraAdapter, choose, lora
from megatune.config.schema import FreezeMethod, LoraMethod, Method
from megatune.models.build import build

__all__ = ["LoraAdapter", "attach", "describe"]


def attach(model: nn.Module, method: Method) -> None:
    """Prepare `model` (a `Decoder`, on meta or not, before any sharding) to train what `method` says, in place.

    Raises ConfigError where the method names layers or parameters that the model does not have. What it names is
    looked for in the whole model: pipeline stages hold a part of it.
    """
    whole = model if len(model.stages) == model.stages[0].count else build(model.spec)
    if isinstance(method, LoraMethod):
        lora(model, method, choose(whole, method))
    elif isinstance(method, FreezeMethod):
        trained = names(whole, method)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
    else:
        model.requires_grad_(True)


def describe(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters of the global model: a sharded tensor counts whole."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)
