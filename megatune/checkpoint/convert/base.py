"""What all formats agree on: whole tensors under Hugging Face names, read lazily; files written one by one.

A format reads a checkpoint as `Opened` and writes one through a `Target`; nothing converts from one layout to another
directly. Names, shapes and the order of rows are those of the Hugging Face folder of the model's family, for weights
and for optimizer states alike (the moment of `q_proj.weight` is called `q_proj.weight`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from megatune.checkpoint.sources import TensorSource

What = Literal["mapped", "padded", "trimmed", "tied", "cast", "skipped"]
# Optimizer states that have a meaning in more than one format: fp32, one tensor for each trained weight.
SLOTS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Line:
    """What became of one tensor; `detail`: from what, how many rows, why."""

    tensor: str
    what: What
    detail: str = ""


@dataclass
class Opened:
    """A checkpoint, of which only headers were read.

    `weights`: the model, Hugging Face names. `optimizer`: slot (of `SLOTS`) -> states by weight, empty where there are
    none or they are not wanted. `step`: finished optimizer steps, None where the format does not say. `extras`: the
    folder whose tokenizer, chat template and generation config belong to the model. `report`: what the reader already
    knows of tensors that do not come through one to one.
    """

    kind: str
    path: Path
    hf_config: dict[str, Any]
    weights: TensorSource
    optimizer: Mapping[str, TensorSource] = field(default_factory=dict)
    step: int | None = None
    extras: Path | None = None
    report: list[Line] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """What the user may say. `like`: a Hugging Face folder whose config and tokenizer are used where the source has
    none. `tensor`, `pipeline`, `virtual`, `expert`: the layout to write, where the format has one. `vocab_multiple`:
    the padded vocabulary is a multiple of this times `tensor`. `step`: which of several checkpoints; default: newest.
    `adapter`: a PEFT folder to merge or carry along."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    expert: int = 1
    vocab_multiple: int = 128
    dtype: torch.dtype | None = None
    optimizer: bool = True
    like: str | None = None
    adapter: str | None = None
    step: int | None = None


@dataclass(frozen=True)
class Job:
    """One file (or folder of files) of the destination, made on its own, in any order, in any process. `file`: its
    path in the destination; `size`: its bytes, for the progress bar and the check of free space."""

    file: str
    size: int


class Target(Protocol):
    """A checkpoint being written. Jobs are idempotent: one that was cut is made again."""

    report: list[Line]

    def jobs(self) -> list[Job]: ...

    def make(self, job: Job, folder: Path) -> None:
        """Write `folder / job.file`; memory beside it: at most twice the largest tensor."""
        ...

    def finish(self, folder: Path) -> None:
        """Write what belongs to no job (index, metadata, configs), after all jobs."""
        ...


@dataclass(frozen=True)
class Format:
    """One format. `detect`: whether a path is one (must not raise on foreign folders, opens no pickle). `target`: None
    where it can only be read."""

    name: str
    title: str
    detect: Callable[[Path], bool]
    open: Callable[[Path, Options], Opened]
    target: Callable[[Opened, Options], Target] | None = None
