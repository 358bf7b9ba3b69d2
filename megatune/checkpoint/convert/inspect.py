"""What a checkpoint is: format, layout, step, sizes, and whether it is whole."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatune.checkpoint.convert import formats
from megatune.checkpoint.convert.base import Opened, Options
from megatune.checkpoint.convert.digest import complete, describe, portions, size_of
from megatune.checkpoint.convert.names import whole_model
from megatune.checkpoint.manifest import DTYPE_NAMES
from megatune.checkpoint.sources import TensorSource, read_json
from megatune.errors import CheckpointError, MegatuneError
from megatune.models.registry import family_for

_MEGATRON_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?")
_DEEPSPEED_RANK = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_\d+_?optim_states\.pt")
_DIGESTS = "megatune-digests.json"


@dataclass
class Facts:
    """`layout`: how it was written, in words. `tensors`, `parameters`, `bytes`: of the weights. `dtypes`: name ->
    number of weights. `optimizer`: slot -> number of states. `wrong`: why it is not whole; None where it is.
    `checked`: every byte was read. `infinite`: weights with values that are not finite."""

    path: Path
    format: str
    title: str
    layout: str
    files: int
    disk_bytes: int
    model: str = ""
    step: int | None = None
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    optimizer: dict[str, int] = field(default_factory=dict)
    wrong: str | None = None
    checked: bool = False
    infinite: list[str] = field(default_factory=list)


def inspect(path: Path, options: Options | None = None, *, full: bool = False) -> Facts:
    """Look at a checkpoint of any format; only headers are read, or (`full`) every byte, against checksums where the
    format has them. CheckpointError where it is none at all; what is wrong with one that is, is in the facts."""
    found = formats.find(path)
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    facts = Facts(path, found.name, found.title, "", len(files), size)
    try:
        opened = found.open(path, options or Options())
        opened = whole_model(opened) if found.checks_names else opened
        facts.layout = layout_of(found.name, opened.path if found.name == "megatune" else path)
        _describe(facts, opened)
        if full:
            _read_all(facts, opened)
    except MegatuneError as error:
        facts.layout = facts.layout or layout_of(found.name, path)
        facts.wrong = str(error)
    return facts


def layout_of(kind: str, path: Path) -> str:
    """The layout that the files' names tell."""
    names = [file.name for file in _within(path)]
    if kind == "megatron":
        return _megatron(names)
    if kind == "deepspeed":
        return _deepspeed(names)
    if kind in ("dcp", "torch_dist"):
        ranks = {name.partition("_")[2].partition("_")[0] for name in names if name.endswith(".distcp")}
        return f"global tensors, written by {len(ranks)} rank{'s' * (len(ranks) != 1)}"
    if kind == "megatune":
        ranks = {name for name in names if name.endswith(".safetensors")}
        return f"global tensors (any layout), {len(ranks)} file{'s' * (len(ranks) != 1)}"
    shards = sum(name.endswith((".safetensors", ".bin", ".gguf")) for name in names) or 1
    return f"whole tensors in {shards} file{'s' * (shards != 1)}"


def _within(path: Path, depth: int = 3) -> Iterator[Path]:
    """Entries of a folder down to some depth, files and folders; links are not followed."""
    if not path.is_dir() or path.is_symlink():
        return
    for one in sorted(path.iterdir()):
        yield one
        if depth > 1 and one.is_dir():
            yield from _within(one, depth - 1)


def _megatron(names: list[str]) -> str:
    ranks = [match for name in names if (match := _MEGATRON_RANK.fullmatch(name))]
    tensor = len({match[1] for match in ranks})
    # mp_rank_TT_EEE or mp_rank_TT_PPP or mp_rank_TT_PPP_EEE: two numbers do not say which the second is.
    second, third = (len({match[n] for match in ranks if match[n]}) for n in (2, 3))
    if third:
        return f"tensor {tensor} x pipeline {second} x expert {third}"
    return f"tensor {tensor}" + (f" x pipeline (or expert) {second}" if second else "")


def _deepspeed(names: list[str]) -> str:
    ranks = {match[1] for name in names if (match := _DEEPSPEED_RANK.fullmatch(name))}
    if "fp32.pt" in names or "zero" in names:
        return "universal (a folder for each parameter)"
    if not ranks:
        return "ZeRO stage 0, whole tensors"
    dealt = any(re.fullmatch(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt", name) for name in names)
    return f"ZeRO stage {'3' if dealt else '1 or 2'} over {len(ranks)} rank{'s' * (len(ranks) != 1)}"


def _describe(facts: Facts, opened: Opened) -> None:
    weights = opened.weights
    names = weights.names()
    facts.step = opened.step
    facts.model = _model(opened.hf_config)
    facts.tensors = len(names)
    facts.parameters = sum(math.prod(weights.shape(name)) for name in names)
    facts.bytes = sum(size_of(weights, name) for name in names)
    facts.dtypes = dict(Counter(_short(weights.dtype(name)) for name in names).most_common())
    facts.optimizer = {slot: len(source.names()) for slot, source in opened.optimizer.items()}


def _model(config: dict[str, Any]) -> str:
    spec = family_for(config).spec(config)
    sizes = f"{len(spec.layers)} layers, hidden size {spec.hidden_size}, vocabulary {spec.vocab_size}"
    words = f"{config.get('model_type')}, {sizes}"
    return words + (", tied embeddings" if spec.tied_embeddings else "")


def _short(dtype: torch.dtype) -> str:
    return DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def _read_all(facts: Facts, opened: Opened) -> None:
    """Read every byte: against checksums (megatune's own, those of a conversion); find values that are no numbers."""
    if facts.format == "megatune":
        from megatune.checkpoint.retention import verify

        verify(opened.path)
    expected = _expected(facts.path)
    for section, source in {"weights": opened.weights, **opened.optimizer}.items():
        for name in sorted(source.names()):
            if not _is_finite(source, name):
                facts.infinite.append(name if section == "weights" else f"{section} of {name}")
            known = expected.get(section, {}).get(name)
            if known is not None and known != describe(source, name, complete(source, name, {})):
                raise CheckpointError(
                    f"{facts.path}: {name} ({section}) is not what {_DIGESTS} says; convert or copy it again"
                )
    facts.checked = True


def _expected(path: Path) -> dict[str, Any]:
    """Digests that a conversion wrote beside what it made."""
    if not (path / _DIGESTS).is_file():
        return {}
    found = read_json(path / _DIGESTS).get("tensors")
    return (
        {key: value for key, value in found.items() if isinstance(value, dict)}
        if isinstance(found, dict)
        else {}
    )


def _is_finite(source: TensorSource, name: str) -> bool:
    shape = source.shape(name)
    if not shape or not source.dtype(name).is_floating_point:
        return True
    return all(
        bool(torch.isfinite(source.rows(name, start, stop).float()).all())
        for start, stop in portions(source, name)
    )


def show(facts: Facts) -> None:
    """Print the facts, a line each."""
    lines = {"path": str(facts.path), "format": f"{facts.format} ({facts.title})", "layout": facts.layout}
    if facts.model:
        lines["model"] = facts.model
    if facts.step is not None:
        lines["step"] = str(facts.step)
    if facts.tensors:
        dtypes = ", ".join(f"{count} {name}" for name, count in facts.dtypes.items())
        lines["weights"] = (
            f"{facts.parameters:,} parameters in {facts.tensors} tensors ({dtypes}), {facts.bytes / 2**20:,.1f} MiB"
        )
        states = ", ".join(f"{slot} of {count}" for slot, count in facts.optimizer.items())
        lines["optimizer"] = states or "none"
    lines["on disk"] = f"{facts.files} files, {facts.disk_bytes / 2**20:,.1f} MiB"
    if facts.infinite:
        lines["not finite"] = ", ".join(facts.infinite[:5]) + (" ..." if len(facts.infinite) > 5 else "")
    whole = (
        "yes, every byte read" if facts.checked else "yes, as far as headers tell (--full reads every byte)"
    )
    lines["whole"] = whole if facts.wrong is None else f"no: {facts.wrong}"
    for name, text in lines.items():
        print(f"{name + ':':11}{text}")


def to_json(facts: Facts) -> str:
    return json.dumps({**vars(facts), "path": str(facts.path)}, indent=1)
