"""What all formats agree on: whole tensors under Hugging Face names, read lazily; files written one by one.

A format reads a checkpoint as `Opened` and writes one through a `Target`; nothing converts from one layout to another
directly. Names, shapes and the order of rows are those of the Hugging Face folder of the model's family, for weights
and for optimizer states alike (the moment of `q_proj.weight` is called `q_proj.weight`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from megatune.checkpoint.hf import COPIED
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
    knows of tensors that do not come through one to one. `write_extras`: where there is no such folder, writes these
    files into one. `adapter`: config (adapter_config.json) and tensors of a PEFT adapter that is in `weights` already.
    """

    kind: str
    path: Path
    hf_config: dict[str, Any]
    weights: TensorSource
    optimizer: Mapping[str, TensorSource] = field(default_factory=dict)
    step: int | None = None
    extras: Path | None = None
    report: list[Line] = field(default_factory=list)
    write_extras: Callable[[Path], None] | None = None
    adapter: tuple[dict[str, Any], TensorSource] | None = None


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
    path in the destination; `size`: its bytes, for the progress bar and the check of free space. `part`: which part of
    the file, where several jobs write into one."""

    file: str
    size: int
    part: int = 0


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
    where it can only be read. `takes`: the part of a source that the format has a place for (default: all of it; what
    is left out goes into the report). `reopen`: reads what was written, where `open` would give something else.
    `checks_names`: weights are those of a whole model, each one under its Hugging Face name."""

    name: str
    title: str
    detect: Callable[[Path], bool]
    open: Callable[[Path, Options], Opened]
    target: Callable[[Opened, Options], Target] | None = None
    takes: Callable[[Opened, Options], Opened] | None = None
    reopen: Callable[[Path, Options], Opened] | None = None
    checks_names: bool = True


def kin(source: TensorSource, name: str) -> str:
    """What a tensor is read with: reading tensors of one kin side by side, the same share of rows of each, reads every
    byte once (q, k and v are one tensor in some checkpoints). A source may have a method `kin`; default: `name`."""
    own = getattr(source, "kin", None)
    return name if own is None else own(name)


def copy_extras(opened: Opened, folder: Path) -> None:
    """Write tokenizer, chat template, generation config and licence of a model into `folder`."""
    if opened.write_extras is not None:
        opened.write_extras(folder)
    elif opened.extras is not None:
        for pattern in COPIED:
            for file in opened.extras.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
