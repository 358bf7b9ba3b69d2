"""The checkpoints in a run's folder: which there are, which of them stay.

Names of folders: `step-000120` is a checkpoint; anything that starts with a dot is unfinished or left by a dead
process, and no reader looks at it.
"""

from __future__ import annotations

import logging
import math
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatune.checkpoint import files
from megatune.checkpoint.manifest import RUN, DamagedError, Manifest, read_json, read_manifest, short
from megatune.checkpoint.reader import CheckpointFile
from megatune.errors import CheckpointError

_log = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d{6,})")
_LARGEST_RUN = 16 * 2**20  # bytes of run.json


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the newest `last`, those whose step is a multiple of `every` (0: none), and the `best`
    ones by metric (0: none), smaller being better."""

    last: int = 1
    every: int = 0
    best: int = 0

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ValueError("at least 1 of the newest: the only checkpoint is never removed")


def steps(folder: str | Path) -> list[Path]:
    """Checkpoint folders by step, oldest first, valid or not."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def problem(step_folder: str | Path) -> str | None:
    """What is wrong with a checkpoint at a quick look (manifest, files, sizes; not their bytes); None: nothing."""
    try:
        quick_check(Path(step_folder))
    except CheckpointError as error:
        return str(error)
    return None


def newest(folder: str | Path, warn: Callable[[str], None] | None = None) -> Path | None:
    """The newest checkpoint that is whole at a quick look, or None. `warn` gets a sentence for each one passed over
    (default: the log). Files' bytes are verified as they are loaded."""
    for path in reversed(steps(folder)):
        wrong = problem(path)
        if wrong is None:
            return path
        (warn or _log.warning)(f"checkpoint {path.name} is passed over: {wrong}")
    return None


def verify(step_folder: str | Path) -> None:
    """Read every byte of a checkpoint. Raises DamagedError (a CheckpointError) that names what is wrong."""
    step_folder = Path(step_folder)
    manifest = quick_check(step_folder)
    for name, entry in manifest.files.items():
        CheckpointFile(step_folder / name, entry).verify_all()


def quick_check(step_folder: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all there with their sizes. Raises DamagedError where not."""
    manifest = read_manifest(step_folder)
    for name, entry in manifest.files.items():
        CheckpointFile(step_folder / name, entry)
    return manifest


def read_run(step_folder: Path, manifest: Manifest) -> dict[str, Any]:
    """What run.json says, verified. Raises DamagedError."""
    path = step_folder / RUN
    text = CheckpointFile(path, manifest.files[RUN]).read_all(_LARGEST_RUN)
    try:
        run = read_json(text)
        if not isinstance(run["extra"], dict):
            raise ValueError("its extra is no object")
        return run
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{path} is not what megatune writes: {short(error)}") from error


def metric(step_folder: str | Path) -> float | None:
    """The metric that a checkpoint was saved with; None where it has none, or is not whole at a quick look."""
    try:
        value = read_run(Path(step_folder), quick_check(Path(step_folder))).get("metric")
    except CheckpointError:
        return None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def best(folder: str | Path, count: int = 1) -> list[Path]:
    """The `count` checkpoints with the smallest metric, the best first; of equal ones the newer."""
    found = [
        (value, -number, path)
        for number, path in enumerate(steps(folder))
        if (value := metric(path)) is not None
    ]
    return [path for _, _, path in sorted(found)[:count]]


def prune(folder: str | Path, keep: Keep) -> list[Path]:
    """Remove all checkpoints but those of `keep`; returns what was removed, the newest first.

    Every published checkpoint was read back by its writers. Those that are damaged do not count among the newest or
    best. Nothing is removed that is newer than the oldest of the newest ones kept, and nothing at all where none is
    valid. A folder gets a hidden name, which is on the disk before its files go.
    """
    folder = Path(folder)
    last: list[Path] = []
    older: list[Path] = []
    for path in reversed(steps(folder)):
        if len(last) == keep.last:
            older.append(path)
        elif problem(path) is None:
            last.append(path)
    if keep.every:
        older = [path for path in older if int(_STEP.fullmatch(path.name)[1]) % keep.every]
    if keep.best and older:
        stay = set(best(folder, keep.best))
        older = [path for path in older if path not in stay]
    hidden = [path.with_name(f".{path.name}.{secrets.token_hex(4)}.pruned") for path in older]
    for path, name in zip(older, hidden, strict=True):
        files.rename(path, name)
    if hidden:
        files.sync_folder(folder)
    for name in hidden:
        files.remove_tree(name)
    return older


def set_aside(damaged: list[Path]) -> None:
    """Give checkpoints that were passed over a name that no reader takes for one: retention must not count them."""
    for path in damaged:
        files.rename(path, path.with_name(f"damaged-{path.name}.{secrets.token_hex(4)}"))


def clean(folder: str | Path) -> list[Path]:
    """Remove what dead processes left (one process, before the run's first save); returns what was removed.

    A checkpoint whose replacement never came gets its name back.
    """
    folder = Path(folder)
    removed = []
    for path in sorted(folder.glob(".step-*")) if folder.is_dir() else []:
        original = folder / path.name.split(".")[1]
        if path.name.endswith(".replaced") and not original.exists():
            files.rename(path, original)
            files.sync_folder(folder)
            continue
        if path.is_dir():
            files.remove_tree(path)
        else:
            files.remove_file(path)
        removed.append(path)
    return removed
