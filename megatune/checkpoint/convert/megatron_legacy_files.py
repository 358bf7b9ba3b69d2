"""The rank files of a legacy Megatron checkpoint: where they are, which part of the model each holds, what is in it.

A folder `mp_rank_TT[_PPP][_EEE]` holds `model_optim_rng.pt` of one tensor, pipeline and expert parallel rank; the
second number is there with pipelines, the third (or second) with expert parallelism. A file has the stage's layers,
counted from 0 in each of its chunks (`model`, or `model0`, `model1`, ... with virtual pipelines).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatune.checkpoint.convert.megatron_legacy_old import modern
from megatune.checkpoint.convert.pickles import LazyTensor, Opaque, open_pickle
from megatune.errors import CheckpointError

FILE = "model_optim_rng.pt"
OPTIMIZER_FILE = "distrib_optim.pt"
TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
TOKENIZER = "tokenizer"  # ours, beside the steps: what Megatron's files do not hold

_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_STEP = re.compile(r"iter_(\d{7,})")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Sizes:
    """The layout a checkpoint was saved under; `expert_tensor`: tensor parallelism of the experts."""

    tensor: int
    pipeline: int
    virtual: int
    expert: int
    expert_tensor: int


@dataclass(frozen=True, eq=False)
class Chunk:
    """What one file holds of one run of layers. `tensors`: by Megatron's names, layers counted from 0. `states`: number
    of entries that are settings of fp8, not tensors of the model."""

    path: Path
    tensors: Mapping[str, LazyTensor]
    states: int

    @cached_property
    def layers(self) -> int:
        """How many layers it has; CheckpointError where a number is left out."""
        found = {int(match[1]) for name in self.tensors if (match := _LAYER.fullmatch(name))}
        if found and max(found) + 1 != len(found):
            gap = min(set(range(len(found))) - found)
            raise CheckpointError(
                f"{self.path}: has layers up to {max(found)} but not layer {gap}; copy it again"
            )
        return len(found)


@dataclass(frozen=True, eq=False)
class RankFile:
    """One rank's file, of which only names and places were read. `tensor`, `stage`: its parallel ranks."""

    path: Path
    tensor: int
    stage: int
    args: Mapping[str, Any]
    version: float
    content: Mapping[str, Any]
    chunks: tuple[Chunk, ...]


def is_legacy(path: Path) -> bool:
    """Whether a folder is a legacy checkpoint, or a run's folder with some; opens nothing."""
    if not path.is_dir():
        return False
    return _has_ranks(path) or any(_has_ranks(folder) for folder in _steps(path).values())


def _has_ranks(folder: Path) -> bool:
    return any(_RANK.fullmatch(item.name) and (item / FILE).is_file() for item in folder.glob("mp_rank_*"))


def _steps(root: Path) -> dict[int | None, Path]:
    """Step folders by step; None is `release`."""
    found: dict[int | None, Path] = {None: root / RELEASE} if (root / RELEASE).is_dir() else {}
    for item in root.glob("iter_*"):
        match = _STEP.fullmatch(item.name)
        if match and item.is_dir():
            found[int(match[1])] = item
    return found


def find_step(path: Path, step: int | None) -> tuple[Path, int | None]:
    """The folder with the ranks' files and its step (None: a release). `path`: that folder or the one above; `step`:
    default the one that the tracker file names, and the newest where there is none."""
    if _has_ranks(path):
        match = _STEP.fullmatch(path.resolve().name)
        return path, int(match[1]) if match else None
    found = {number: folder for number, folder in _steps(path).items() if _has_ranks(folder)}
    if not found:
        raise CheckpointError(
            f"{path}: holds no iter_*/mp_rank_*/{FILE}; name the folder of a legacy checkpoint"
        )
    if step is None:
        step = _tracked(path) if (path / TRACKER).is_file() else max(found, key=lambda number: number or -1)
    if step not in found:
        there = ", ".join(sorted(folder.name for folder in found.values()))
        wanted = RELEASE if step is None else f"step {step}"
        raise CheckpointError(f"{path}: has no {wanted}; there is {there}")
    return found[step], step


def _tracked(path: Path) -> int | None:
    text = (path / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    if text == RELEASE:
        return None
    if not text.isdecimal() or len(text) > 15:
        raise CheckpointError(
            f"{path / TRACKER}: holds {text[:20]!r}, not a step or `{RELEASE}`; name the step's folder instead"
        )
    return int(text)


class Ranks:
    """The files of one checkpoint, opened as they are asked for. `args`: those of the first file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._there: dict[tuple[int, ...], Path] = {}
        for item in folder.glob("mp_rank_*"):
            match = _RANK.fullmatch(item.name)
            if match and (item / FILE).is_file():
                self._there[tuple(int(number) for number in match.groups() if number is not None)] = item
        self._open: dict[Path, RankFile] = {}
        first = _open(self._there[min(self._there)] / FILE, 0, 0)
        self.args = first.args
        self.sizes = _sizes(first)
        self._check_grid()

    def opened(self) -> list[RankFile]:
        """The files that were asked for until now."""
        return list(self._open.values())

    def _check_grid(self) -> None:
        sizes = self.sizes
        numbers = 1 + (sizes.pipeline > 1) + (sizes.expert > 1)
        for ranks, folder in self._there.items():
            names = [("tensor", sizes.tensor)]
            names += [("pipeline", sizes.pipeline)] if sizes.pipeline > 1 else []
            names += [("expert", sizes.expert)] if sizes.expert > 1 else []
            if len(ranks) != numbers:
                raise CheckpointError(
                    f"{folder}: its name has {len(ranks)} numbers, but the arguments in it ({sizes}) ask for "
                    f"{numbers}; files of two checkpoints are mixed here"
                )
            for rank, (kind, size) in zip(ranks, names, strict=True):
                if rank >= size:
                    raise CheckpointError(
                        f"{folder}: is of {kind} parallel rank {rank}, but the arguments say that {kind} parallel "
                        f"size is {size}; files of two checkpoints are mixed here"
                    )

    def at(self, tensor: int, pipeline: int, expert: int | None = None) -> RankFile:
        """The file of one rank; any of those that hold the same dense weights where `expert` is None."""
        experts = range(self.sizes.expert) if expert is None else (expert,)
        for one in experts:
            folder = self._there.get(self._ranks(tensor, pipeline, one))
            if folder is not None:
                return self._load(folder, tensor, pipeline)
        raise self._missing(tensor, pipeline, experts[0])

    def of_experts(self, expert: int, expert_tensor: int, pipeline: int) -> RankFile:
        """The file that holds one share of the experts: tensor parallel ranks stand next to each other among all
        ranks, so that a rank's place among those that share its experts is its own modulo their number."""
        sizes = self.sizes
        fitting = [rank for rank in range(sizes.tensor) if rank % sizes.expert_tensor == expert_tensor]
        for tensor in fitting:
            if self._ranks(tensor, pipeline, expert) in self._there:
                return self.at(tensor, pipeline, expert)
        raise self._missing(fitting[0], pipeline, expert)

    def _missing(self, tensor: int, pipeline: int, expert: int) -> CheckpointError:
        numbers = self._ranks(tensor, pipeline, expert)
        name = f"mp_rank_{numbers[0]:02d}" + "".join(f"_{number:03d}" for number in numbers[1:])
        return CheckpointError(
            f"{self.folder / name / FILE}: missing, though the checkpoint was saved with tensor parallel size "
            f"{self.sizes.tensor}, pipeline {self.sizes.pipeline} and expert {self.sizes.expert}; copy it too"
        )

    def _ranks(self, tensor: int, pipeline: int, expert: int) -> tuple[int, ...]:
        numbers = (tensor,)
        numbers += (pipeline,) if self.sizes.pipeline > 1 else ()
        return numbers + ((expert,) if self.sizes.expert > 1 else ())

    def _load(self, folder: Path, tensor: int, stage: int) -> RankFile:
        if folder not in self._open:
            found = _open(folder / FILE, tensor, stage)
            if _sizes(found) != self.sizes:
                raise CheckpointError(
                    f"{found.path}: was saved under another layout ({_sizes(found)}) than the first file of the folder "
                    f"({self.sizes}); files of two checkpoints are mixed here"
                )
            self._open[folder] = found
        return self._open[folder]


def _open(path: Path, tensor: int, stage: int) -> RankFile:
    content = open_pickle(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no checkpoint of Megatron (a {type(content).__name__})")
    args = content.get("args")
    args = args.attributes if isinstance(args, Opaque) else args
    if not isinstance(args, dict):
        raise CheckpointError(
            f"{path}: has no `args`, so its layout is not known; use a checkpoint that Megatron's training saved"
        )
    version = content.get("checkpoint_version", 0)
    version = float(version) if isinstance(version, (int, float)) else 0.0
    models = [content["model"]] if "model" in content else []
    while f"model{len(models)}" in content and "model" not in content:
        models.append(content[f"model{len(models)}"])
    if not models or not all(isinstance(model, dict) for model in models):
        raise CheckpointError(f"{path}: has no `model` in it; is it a checkpoint of Megatron?")
    chunks = tuple(_chunk(path, modern(model, version, path)) for model in models)
    return RankFile(path, tensor, stage, args, version, content, chunks)


def _chunk(path: Path, model: Mapping[Any, Any]) -> Chunk:
    tensors, states = {}, 0
    for name, value in model.items():
        if str(name).endswith("_extra_state"):
            states += 1
        elif isinstance(value, LazyTensor):
            tensors[str(name)] = value
        elif value is not None:
            raise CheckpointError(
                f"{path}: {name} is no tensor but a {type(value).__name__}; is the file damaged?"
            )
    return Chunk(path, tensors, states)


def _sizes(file: RankFile) -> Sizes:
    args = file.args

    def size(key: str, default: int = 1) -> int:
        value = args.get(key)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 20:
            raise CheckpointError(f"{file.path}: args.{key} is {value!r}, not a size; the file is damaged")
        return value

    tensor = size("tensor_model_parallel_size", size("model_parallel_size"))
    sizes = Sizes(
        tensor,
        size("pipeline_model_parallel_size"),
        len(file.chunks),
        size("expert_model_parallel_size"),
        size("expert_tensor_parallel_size", tensor),
    )
    if sizes.tensor % sizes.expert_tensor:
        raise CheckpointError(
            f"{file.path}: experts were cut over {sizes.expert_tensor} tensor parallel ranks and the rest over "
            f"{sizes.tensor}, from which a file's place does not follow; save it as torch_dist with Megatron"
        )
    return sizes
