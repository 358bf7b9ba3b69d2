"""Which tensors of two checkpoints differ, and by how much. The formats may differ: both are read as Hugging Face's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatune.checkpoint.convert import formats
from megatune.checkpoint.convert.base import Opened, Options
from megatune.checkpoint.convert.digest import bytes_of, portions
from megatune.checkpoint.convert.names import whole_model
from megatune.checkpoint.sources import TensorSource
from megatune.errors import CheckpointError


@dataclass(frozen=True)
class Difference:
    """One tensor of a `section` ("weights" or a slot of the optimizer) that is not the same in both. `why`: in words,
    where it is missing or has another shape or dtype. `largest`: of |a - b|; `relative`: norm of a - b over that of a
    (infinite where a is zero); `count`: values that differ. NaNs in the same place are equal."""

    section: str
    name: str
    why: str = ""
    largest: float = 0.0
    relative: float = 0.0
    count: int = 0


def open_whole(path: Path, options: Options) -> Opened:
    """A checkpoint of any format as a whole model under Hugging Face names."""
    found = formats.find(path)
    opened = found.open(path, options)
    return whole_model(opened) if found.checks_names else opened


def compare(first: Opened, second: Opened, *, optimizer: bool = True) -> Iterator[Difference]:
    """Differences, tensor by tensor, in the order of names; a few megabytes are in memory at a time. Optimizer states
    are compared where both have them."""
    sections = ["weights"]
    if optimizer:
        sections += [slot for slot in first.optimizer if slot in second.optimizer]
    for section in sections:
        a, b = (one.weights if section == "weights" else one.optimizer[section] for one in (first, second))
        for name in sorted(a.names() | b.names()):
            found = _compare(a, b, section, name)
            if found is not None:
                yield found


def _compare(a: TensorSource, b: TensorSource, section: str, name: str) -> Difference | None:
    for source, other in ((a, "first"), (b, "second")):
        if name not in source.names():
            return Difference(section, name, f"is not in the {other}")
    if a.shape(name) != b.shape(name):
        return Difference(section, name, f"shape {list(a.shape(name))} against {list(b.shape(name))}")
    same_dtype = a.dtype(name) == b.dtype(name)
    largest = squares = norm = 0.0
    count = 0
    for start, stop in portions(a, name):
        x, y = a.rows(name, start, stop), b.rows(name, start, stop)
        if same_dtype and bytes_of(x.contiguous()) == bytes_of(y.contiguous()):
            norm += float(x.double().square().sum())
            continue
        x, y = x.double(), y.double()
        unequal = (x != y) & ~(x.isnan() & y.isnan())
        gap = torch.where(unequal, (x - y).abs(), 0.0)
        largest = max(largest, float(gap.nan_to_num(math.inf, math.inf).max()) if gap.numel() else 0.0)
        squares += float(gap.square().sum())
        norm += float(x.square().sum())
        count += int(unequal.sum())
    if count == 0 and same_dtype:
        return None
    why = "" if same_dtype else f"{_short(a.dtype(name))} against {_short(b.dtype(name))}"
    relative = math.sqrt(squares / norm) if norm else math.inf if squares else 0.0
    return Difference(section, name, why, largest, relative, count)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_paths(paths: list[Path]) -> None:
    """CheckpointError that names the first path that does not exist."""
    for path in paths:
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder")


def show(differences: Iterator[Difference], limit: int = 40) -> int:
    """Print a table of differences as they come; returns their number."""
    number = 0
    for one in differences:
        number += 1
        if number == 1:
            print(f"{'largest':>12} {'relative':>12} {'values':>12}  tensor")
        if number <= limit:
            name = one.name if one.section == "weights" else f"{one.section} of {one.name}"
            figures = f"{one.largest:12.4g} {one.relative:12.4g} {one.count:12,}"
            print(
                f"{figures if one.count or not one.why else ' ' * 38}  {name}"
                + (f": {one.why}" if one.why else "")
            )
    if number > limit:
        print(f"... and {number - limit} more")
    print("equal" if number == 0 else f"{number} tensors differ")
    return number
