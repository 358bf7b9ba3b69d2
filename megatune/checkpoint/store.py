"""Checkpoints of a run: one folder a step, sharded, written in the background, without any layout.

`state` holds global tensors by name, as far as this process holds them (`Parts`), or plain tensors, which are the same
on all processes. What was saved under one layout loads under any other: each process reads just the boxes that it
holds. Names of folders: `step-000120` is a checkpoint; anything that starts
with a dot is unfinished or left by a dead process, and no reader looks at it.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatune import __version__
from megatune.checkpoint import files
from megatune.checkpoint.boxes import whole_parts
from megatune.checkpoint.manifest import RUN, Chunk, DamagedError, Manifest, TensorEntry, read_manifest
from megatune.checkpoint.reader import CheckpointFile, ShardFile
from megatune.checkpoint.writer import Job, PendingSave, plan, snapshot
from megatune.errors import CheckpointError
from megatune.parallel.shard import Box, Parts

_log = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d{6,})")
_READ_THREADS = 4

_in_flight: PendingSave | None = None

State = Mapping[str, Tensor | Parts]


class Processes(Protocol):
    """What of `World` is used here."""

    rank: int
    world_size: int

    @property
    def is_main(self) -> bool: ...

    def broadcast(self, value: Any) -> Any: ...

    def max(self, values: list[float]) -> list[float]: ...

    def gather_objects(self, value: Any) -> list[Any]: ...


def save(
    folder: str | Path,
    step: int,
    state: State,
    extra: dict[str, Any],
    world: Processes,
    *,
    keep_last: int | None = None,
    background: bool = True,
    timeout: float = 1800.0,
) -> PendingSave:
    """Save `state` as `<folder>/step-<step>`; every process calls it, with the names that it holds something of.

    When it returns, the state is copied and may change; the files follow in the background (`background=False`: they
    are there when it returns, and host tensors are not copied). `extra`: JSON values, rank 0's are kept. `keep_last`:
    then prune to that many. Waits for the save before this one. Each file is read back before the checkpoint counts.

    Plain tensors must be the same on all processes; of `Parts`, those that one `writes` are saved, and all processes
    together must cover each tensor exactly once. `timeout`: seconds in which each process
    has to finish its file.
    Raises CheckpointError where the folder cannot be written, or an earlier save failed and nobody looked.
    """
    global _in_flight
    folder = Path(folder)
    if _in_flight is not None:
        _in_flight.wait()
    mine, shared_digest = plan(state, world.rank, world.world_size)
    versions = {"megatune": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    run_text = json.dumps({"step": step, "versions": versions, "extra": extra}, indent=1).encode()
    final = folder / f"step-{step:06d}"
    pieces = snapshot(mine, copy=background)
    name, problem = world.broadcast(_make_temporary(folder, final.name) if world.is_main else None)
    if problem:
        raise CheckpointError(problem)

    def after() -> None:
        if keep_last is not None:
            prune(folder, keep_last)

    job = Job(
        temporary=folder / name,
        final=final,
        step=step,
        rank=world.rank,
        world_size=world.world_size,
        pieces=pieces,
        shared_digest=shared_digest,
        run_text=run_text,
        after=after,
        timeout=timeout,
    )
    _in_flight = pending = PendingSave(job, background=background)
    if not background:
        pending.check()
    return pending


def _make_temporary(folder: Path, name: str) -> tuple[str, str | None]:
    """(name of a new hidden folder, None) or ("", what is wrong): the other processes wait for either."""
    hidden = f".{name}.{secrets.token_hex(4)}"
    try:
        files.make_folder(folder / hidden)
    except OSError as error:
        return (
            "",
            f"{name} cannot be saved: {folder} cannot be written ({error.strerror}); earlier ones are whole",
        )
    return hidden, None


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
        _quick_check(Path(step_folder))
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
    manifest = _quick_check(step_folder)
    for name, entry in manifest.files.items():
        CheckpointFile(step_folder / name, entry).verify_all()


def _quick_check(step_folder: Path) -> Manifest:
    manifest = read_manifest(step_folder)
    for name, entry in manifest.files.items():
        try:
            size = (step_folder / name).stat().st_size
        except OSError as error:
            raise DamagedError(f"{step_folder / name} is missing ({error.strerror})") from error
        if size != entry.size:
            raise DamagedError(f"{step_folder / name} has {size} bytes instead of {entry.size}")
    return manifest


def load(
    step_folder: str | Path,
    state: State,
    *,
    strict: bool = True,
    verify: bool = True,
) -> dict[str, Any]:
    """Fill `state`'s tensors in place, however they are cut; returns `extra`. No communication.

    `strict`: the checkpoint must have all names of `state` (what else it has is not looked at: other processes may
    hold it); else only those that it has are filled. `verify`: check the checksum of every block that is read. Raises
    CheckpointError for a name, shape or dtype that does not fit, before anything is filled; DamagedError (a
    CheckpointError) where bytes are missing or wrong, when some tensors may already be filled.
    """
    step_folder = Path(step_folder)
    manifest = read_manifest(step_folder)
    parts = {name: _parts(value) for name, value in state.items()}
    names = _matching_names(step_folder, manifest, parts, strict)
    run = CheckpointFile(step_folder / RUN, manifest.files[RUN], verify=verify)
    extra = json.loads(run.read_all())["extra"]
    work = [
        (name, manifest.tensors[name], box, tensor) for name in names for box, tensor in parts[name].parts
    ]
    needed = {chunk.file for _, entry, box, _ in work for chunk in _chunks_in(entry, box)}
    shards = {
        name: ShardFile(step_folder / name, manifest.files[name], verify=verify) for name in sorted(needed)
    }
    with ThreadPoolExecutor(min(_READ_THREADS, os.cpu_count() or 1)) as pool:
        for _ in pool.map(lambda item: _fill(*item, shards), work):
            pass
    return extra


def restore(
    folder: str | Path,
    state: State,
    world: Processes,
    warn: Callable[[str], None] | None = None,
) -> tuple[Path, dict[str, Any]] | None:
    """What a start does: `clean`, then `load` the newest checkpoint that is whole to the last byte, on all processes
    together. Returns (its folder, extra), or None where there is no checkpoint at all.

    A damaged checkpoint is passed over with a sentence to `warn`, on every process for the same older one. Raises
    CheckpointError, on all processes the same, where there are checkpoints and none is whole, or where one does not
    fit: it lacks a tensor of some process, has it otherwise, or holds one that no process has.
    """
    folder = Path(folder)
    if world.is_main:
        clean(folder)
        candidates = [str(path) for path in reversed(steps(folder))]
    candidates = world.broadcast(candidates if world.is_main else None)
    for text in candidates:
        path, extra, wrong = Path(text), {}, None
        try:
            manifest = _quick_check(path)
        except DamagedError as error:
            wrong = str(error)
        if not _any(world, wrong):
            _check_fit(path, manifest, state, world)
            try:
                extra = load(path, state)
            except DamagedError as error:
                wrong = str(error)
            if not _any(world, wrong):
                if world.is_main:
                    _set_aside(candidates[: candidates.index(text)])
                return path, extra
        (warn or _log.warning)(
            f"checkpoint {path.name} is passed over: {wrong or 'another process found it damaged'}"
        )
    if candidates:
        raise CheckpointError(
            f"{folder}: none of the {len(candidates)} checkpoints is whole (see the log for each); restore one, or "
            f"remove the folder to start anew"
        )
    return None


def _any(world: Processes, wrong: str | None) -> bool:
    """Whether something is wrong on any process."""
    return bool(world.max([float(wrong is not None)])[0])


def _check_fit(path: Path, manifest: Manifest, state: State, world: Processes) -> None:
    """Raise the same CheckpointError on all processes where the checkpoint is not of what they hold together."""
    try:
        _matching_names(path, manifest, {name: _parts(value) for name, value in state.items()}, True)
        wrong = None
    except CheckpointError as error:
        wrong = str(error)
    wrong = world.broadcast(next((text for text in world.gather_objects(wrong) if text), None))
    if wrong:
        raise CheckpointError(wrong)
    names = sorted(manifest.tensors)
    wanted = world.max([float(name in state) for name in names])
    unwanted = [name for name, count in zip(names, wanted, strict=True) if not count]
    if unwanted:
        raise CheckpointError(
            f"{path} holds {_some(unwanted)} too; it was saved from another model or method"
        )


def _set_aside(damaged: list[str]) -> None:
    """Give checkpoints that were passed over a name that no reader takes for one: retention must not count them."""
    for text in damaged:
        path = Path(text)
        files.rename(path, path.with_name(f"damaged-{path.name}.{secrets.token_hex(4)}"))


def _parts(value: Tensor | Parts) -> Parts:
    return whole_parts(value) if isinstance(value, Tensor) else value


def _matching_names(
    step_folder: Path, manifest: Manifest, state: Mapping[str, Parts], strict: bool
) -> list[str]:
    """The names of `state` that the checkpoint has; CheckpointError where one differs, or is not there (`strict`)."""
    missing = sorted(state.keys() - manifest.tensors.keys())
    if strict and missing:
        raise CheckpointError(
            f"{step_folder} lacks {_some(missing)}; it was saved from another model or method"
        )
    names = [name for name in state if name in manifest.tensors]
    for name in names:
        stored, wanted = manifest.tensors[name], state[name]
        pairs = [("shape", stored.shape, wanted.shape)]
        pairs += [("dtype", stored.dtype, tensor.dtype) for _, tensor in wanted.parts]
        for what, there, here in pairs:
            if there != here:
                raise CheckpointError(
                    f"{step_folder}: {name} has {what} {there}, this run needs {here}; it was saved from another model"
                )
    return names


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")


def _chunks_in(entry: TensorEntry, box: Box) -> list[Chunk]:
    return [chunk for chunk in entry.chunks if box & chunk.box is not None]


def _fill(name: str, entry: TensorEntry, box: Box, tensor: Tensor, shards: dict[str, ShardFile]) -> None:
    with torch.no_grad():  # per thread
        filled = sum(
            shards[chunk.file].fill(tensor, box, chunk, entry.dtype) for chunk in _chunks_in(entry, box)
        )
    if filled != box.numel:
        raise DamagedError(f"{name}: the checkpoint's chunks fill {filled} of {box.numel} elements")


def prune(folder: str | Path, keep_last: int) -> list[Path]:
    """Remove all but the newest `keep_last` valid checkpoints; returns what was removed.

    Every published checkpoint was read back by its writers. Nothing is removed that is newer than the oldest one kept,
    and nothing at all where none is valid. A folder gets a hidden name before its files go.
    """
    if keep_last < 1:
        raise ValueError("keep_last must be at least 1: the only checkpoint is never removed")
    kept: list[Path] = []
    removed: list[Path] = []
    for path in reversed(steps(folder)):
        if len(kept) < keep_last:
            if problem(path) is None:
                kept.append(path)
            continue
        hidden = path.with_name(f".{path.name}.{secrets.token_hex(4)}.pruned")
        files.rename(path, hidden)
        files.remove_tree(hidden)
        removed.append(path)
    return removed


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
            continue
        if path.is_dir():
            files.remove_tree(path)
        else:
            files.remove_file(path)
        removed.append(path)
    return removed


def written_bytes(state: State) -> int:
    """Bytes of one checkpoint that this process writes, its plain tensors in full (headers are under 1 %)."""
    total = 0
    for value in state.values():
        if isinstance(value, Tensor):
            total += value.nbytes
        elif value.writes:
            total += sum(tensor.nbytes for _, tensor in value.parts)
    return total


def check_space(folder: str | Path, bytes_needed: int) -> None:
    """Raise CheckpointError where `folder` (it need not exist) cannot be written or has less space than needed."""
    folder = Path(folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"{existing} cannot be written; choose another checkpoint.folder or change its rights"
        )
    free = shutil.disk_usage(existing).free
    if free < bytes_needed:
        raise CheckpointError(
            f"{existing} has {free / 2**30:.2f} GiB free and this run's checkpoints and exports need "
            f"{bytes_needed / 2**30:.2f} GiB; free space, choose another checkpoint.folder, or lower "
            f"checkpoint.keep_last or checkpoint.export"
        )
