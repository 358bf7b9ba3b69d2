"""Pipeline stages: which layers each holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Number `number` of the `count` stages of a model: decoder layers `layers`; the first also has the embedding, the
    last one the final norm and the head. `layers` may be empty."""

    number: int
    count: int
    layers: range

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == self.count - 1


def whole(num_layers: int) -> tuple[Stage, ...]:
    """The one stage of a model without pipeline parallelism."""
    return (Stage(0, 1, range(num_layers)),)


def cut(layers: Sequence[int]) -> tuple[Stage, ...]:
    """All stages of a model from the number of layers in each."""
    stages, start = [], 0
    for number, count in enumerate(layers):
        stages.append(Stage(number, len(layers), range(start, start + count)))
        start += count
    return tuple(stages)
