"""The weights of a source as those of one whole model: every tensor known, every known tensor there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from megatune.checkpoint.convert.base import Line, Opened, kin
from megatune.checkpoint.convert.digest import portions
from megatune.checkpoint.hf import FP32
from megatune.checkpoint.mapping import Mapped, check_source
from megatune.checkpoint.pretrained import IGNORED, base_map
from megatune.checkpoint.sources import TensorSource
from megatune.errors import CheckpointError
from megatune.models.families.base import Family
from megatune.models.registry import family_for
from megatune.models.spec import DecoderSpec


class Renamed:
    """A `TensorSource` of some tensors of another, under other names: `actual` by name here."""

    def __init__(self, source: TensorSource, actual: Mapping[str, str]) -> None:
        self._source, self._actual = source, dict(actual)

    def __str__(self) -> str:
        return str(self._source)

    def names(self) -> set[str]:
        return set(self._actual)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._actual[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._actual[name])

    def kin(self, name: str) -> str:
        return kin(self._source, self._actual[name])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._source.rows(self._actual[name], start, stop)


class Cast:
    """A `TensorSource` whose tensors have another dtype: `dtypes` by name; default: their own."""

    def __init__(self, source: TensorSource, dtypes: Mapping[str, torch.dtype]) -> None:
        self._source, self._dtypes = source, dtypes

    def __str__(self) -> str:
        return str(self._source)

    def names(self) -> set[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes.get(name) or self._source.dtype(name)

    def kin(self, name: str) -> str:
        return kin(self._source, name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._source.rows(name, start, stop).to(self.dtype(name))


def model_map(opened: Opened) -> tuple[Family, DecoderSpec, dict[str, Mapped]]:
    """The family of a source's model, and how each of our tensors is made of Hugging Face ones."""
    family = family_for(opened.hf_config)
    spec = family.spec(opened.hf_config)
    return family, spec, base_map(spec)


def whole_model(opened: Opened) -> Opened:
    """`opened` with the names of a whole model, in every slot. Tensors that a file has beyond it (one of a tied pair,
    buffers, layers that the family leaves out) go, with a line in the report. CheckpointError that names the tensor
    where one is missing, does not belong to the model, or has another shape than config.json says."""
    family, spec, mapped = model_map(opened)
    shapes = {name: shape for item in mapped.values() for name, shape in item.hf_shapes().items()}
    names, lines = opened.weights.names(), []
    actual = {name: name for name in shapes}
    if family.prefix and not any(name.startswith(family.prefix) for name in names):
        actual = {name: name.removeprefix(family.prefix) for name in shapes}
    embed = mapped["embed.weight"].pieces[0].hf_name
    head = family.name_map(replace(spec, tied_embeddings=False))["head.weight"][0].hf_name
    dropped = {name for name in names if name.endswith(IGNORED)}
    lines += [
        Line(name, "skipped", "a buffer, computed anew when the model is loaded") for name in sorted(dropped)
    ]
    unused = {name for name in names - dropped if family.is_unused(spec, name)}
    lines += [
        Line(name, "skipped", f"megatune's {family.name} has no place for it") for name in sorted(unused)
    ]
    if spec.tied_embeddings and head in names and embed != head:
        if actual[embed] in names:
            dropped.add(head)
            lines.append(Line(head, "tied", f"the same tensor as {embed}"))
        else:
            actual[embed] = head
            lines.append(Line(embed, "tied", f"stored as {head}"))
    unknown = names - set(actual.values()) - dropped - unused
    # What is not there keeps its own name, so that the message says what is looked for.
    there = {name: real for name, real in actual.items() if real in names}
    view = Renamed(opened.weights, there | {name: name for name in unknown})
    check_source(view, mapped.values(), set(actual))
    optimizer = {slot: _slot(source, slot, shapes) for slot, source in opened.optimizer.items()}
    return replace(
        opened, weights=Renamed(opened.weights, actual), optimizer=optimizer, report=[*opened.report, *lines]
    )


def _slot(source: TensorSource, slot: str, shapes: Mapping[str, tuple[int, ...]]) -> TensorSource:
    for name in sorted(source.names()):
        if shapes.get(name) != source.shape(name):
            wanted = f"{list(shapes[name])} is expected" if name in shapes else "the model has no such weight"
            raise CheckpointError(
                f"{source}: {slot} of {name} has shape {list(source.shape(name))}, but {wanted}"
            )
    return source


def check_tied(opened: Opened, source: TensorSource) -> None:
    """Raise CheckpointError where `source`, the weights as they were before `whole_model`, has both tensors of a tied
    pair and they differ."""
    for line in opened.report:
        is_both = line.what == "tied" and line.detail.startswith("the same tensor as ")
        if not is_both or line.tensor not in source.names():
            continue
        other = line.detail.removeprefix("the same tensor as ")
        same = source.shape(line.tensor) == opened.weights.shape(other)
        for start, stop in portions(source, line.tensor):
            same = same and torch.equal(
                source.rows(line.tensor, start, stop), opened.weights.rows(other, start, stop)
            )
        if not same:
            raise CheckpointError(
                f"{source}: config.json says tie_word_embeddings but {other} and {line.tensor} differ; set it to false "
                "there"
            )


def cast(opened: Opened, dtype: torch.dtype | None) -> Opened:
    """`opened` with weights in `dtype` (but for what routers choose experts by); None: as they are."""
    source = opened.weights
    names = [
        name
        for name in source.names()
        if dtype is not None and source.dtype(name) != dtype and not name.endswith(FP32)
    ]
    if not names:
        return opened
    lines = [Line(name, "cast", f"{_short(source.dtype(name))} to {_short(dtype)}") for name in sorted(names)]
    return replace(opened, weights=Cast(source, dict.fromkeys(names, dtype)), report=[*opened.report, *lines])


def main_dtype(source: TensorSource) -> torch.dtype:
    """The dtype of most of the weights."""
    sizes: dict[torch.dtype, int] = {}
    for name in source.names():
        sizes[source.dtype(name)] = sizes.get(source.dtype(name), 0) + math.prod(source.shape(name))
    return max(sizes, key=lambda dtype: sizes[dtype])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
