"""Checkpoints of a run: one folder a step, sharded, written in the background, without any layout.

`state` holds global tensors by name, as far as this process holds them (`Parts`), or plain tensors, which are the same
on all processes. What was saved under one layout loads under any other: each process reads just the boxes that it
holds.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatune import __version__
from megatune.checkpoint import files
from megatune.checkpoint.boxes import whole_parts
from megatune.checkpoint.manifest import DamagedError, Manifest, check_tensors, read_manifest
from megatune.checkpoint.plan import make_plan
from megatune.checkpoint.reader import fill
from megatune.checkpoint.retention import (
    Keep,
    best,
    clean,
    metric,
    newest,
    problem,
    prune,
    quick_check,
    read_run,
    set_aside,
    steps,
    verify,
)
from megatune.checkpoint.staging import Staging, fits
from megatune.checkpoint.writer import Job, Merged, PendingSave
from megatune.errors import CheckpointError
from megatune.parallel.shard import Parts

__all__ = [
    "Keep",
    "Saver",
    "best",
    "check_space",
    "clean",
    "load",
    "metric",
    "newest",
    "problem",
    "prune",
    "restore",
    "save",
    "steps",
    "verify",
    "written_bytes",
]

_log = logging.getLogger(__name__)

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


class Saver:
    """Saves of one run, whose live `state` stays in the same tensors; all processes make one and call `save` together.

    What does not change from save to save (who writes what, the memory that is copied to, the manifest's tensors) is
    made once. `keep`: which checkpoints stay, None: all; `timeout`: seconds in which each process has to finish its
    file. `warn` hears where there is no memory for a copy.

    Plain tensors must be the same on all processes; of `Parts`, those that one `writes` are saved, and all processes
    together must cover each tensor exactly once. Raises CheckpointError for a dtype that cannot be saved.
    """

    def __init__(
        self,
        folder: str | Path,
        state: State,
        world: Processes,
        *,
        keep: Keep | None = None,
        timeout: float = 1800.0,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._world, self._keep, self._timeout = world, keep, timeout
        self._plan = make_plan(state, world.rank, world.world_size)
        # Before any process here takes its share: the largest, so that all of a node come to the same answer.
        size = int(world.max([float(self._plan.size)])[0])
        is_direct = not fits(size)
        if is_direct:
            (warn or _log.warning)(
                f"{size / 2**30:.1f} GiB a process of host memory are not free for a copy of the state: while a "
                f"checkpoint is saved, training waits for the disk"
            )
        self._staging = Staging(self._plan, is_direct=is_direct)
        self._merged = Merged()

    def prepare(self) -> None:
        """Get the memory for the copy in the background, so that the first save does not wait for it."""

        def allocate() -> None:
            try:
                self._staging.allocate()
            except (
                CheckpointError
            ) as error:  # the first save tries again, and ends the run where it cannot either
                _log.warning("%s", error)

        threading.Thread(target=allocate, name="prepare-saves", daemon=True).start()

    def save(
        self, step: int, extra: dict[str, Any], *, metric: float | None = None, background: bool = True
    ) -> PendingSave:
        """Save the state as `<folder>/step-<step>`. Waits for the save before this one.

        When it returns, all happens in the background: the state must not change until `wait_staged` of the result has
        returned. `background=False`: the checkpoint is there when it returns, and nothing was copied. `extra`: JSON
        values, rank 0's are kept. `metric`: for `Keep.best`. Each file is read back before the checkpoint counts.
        Raises CheckpointError where the folder cannot be written, or an earlier save failed and nobody looked.
        """
        global _in_flight
        if _in_flight is not None:
            _in_flight.wait()
        versions = {
            "megatune": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        }
        run = {"step": step, "metric": metric, "versions": versions, "extra": extra}
        final = self.folder / f"step-{step:06d}"
        world = self._world
        name, wrong = world.broadcast(_make_temporary(self.folder, final.name) if world.is_main else None)
        if wrong:
            raise CheckpointError(wrong)
        job = Job(
            temporary=self.folder / name,
            final=final,
            step=step,
            rank=world.rank,
            world_size=world.world_size,
            plan=self._plan,
            staging=self._staging,
            merged=self._merged,
            run_text=json.dumps(run, indent=1).encode(),
            after=self._prune,
            timeout=self._timeout,
            copies=background and not self._staging.is_direct,
        )
        _in_flight = pending = PendingSave(job, background=background)
        if not background:
            pending.check()
        return pending

    def _prune(self) -> None:
        if self._keep is not None:
            prune(self.folder, self._keep)


def save(
    folder: str | Path,
    step: int,
    state: State,
    extra: dict[str, Any],
    world: Processes,
    *,
    keep: Keep | None = None,
    metric: float | None = None,
    background: bool = True,
    timeout: float = 1800.0,
) -> PendingSave:
    """One save of any state, as by a `Saver`, which is quicker where the same state is saved again. The state is
    copied, and may change, when this returns."""
    if _in_flight is not None:
        _in_flight.wait()
    saver = Saver(folder, state, world, keep=keep, timeout=timeout)
    pending = saver.save(step, extra, metric=metric, background=background)
    pending.wait_staged()
    return pending


def _make_temporary(folder: Path, name: str) -> tuple[str, str | None]:
    """(name of a new hidden folder, None) or ("", what is wrong): the other processes wait for either."""
    hidden = f".{name}.{secrets.token_hex(4)}"
    try:
        files.make_folders(folder)
        files.make_folder(folder / hidden)
    except OSError as error:
        return (
            "",
            f"{name} cannot be saved: {folder} cannot be written ({error.strerror}); earlier ones are whole",
        )
    return hidden, None


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
    return _load(Path(step_folder), read_manifest(Path(step_folder)), state, strict, verify)


def _load(
    step_folder: Path, manifest: Manifest, state: State, strict: bool = True, verify: bool = True
) -> dict[str, Any]:
    parts = {name: _parts(value) for name, value in state.items()}
    names = _matching_names(step_folder, manifest, parts, strict)
    try:
        check_tensors({name: manifest.tensors[name] for name in names}, manifest.files)
    except CheckpointError as error:
        raise DamagedError(f"{step_folder}: {error}") from error
    extra = read_run(step_folder, manifest)["extra"]
    fill(step_folder, manifest, {name: parts[name] for name in names}, verify=verify)
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
            manifest = quick_check(path)
        except DamagedError as error:
            wrong = str(error)
        if not _any(world, wrong):
            _check_fit(path, manifest, state, world)
            try:
                extra = _load(path, manifest, state)
            except DamagedError as error:
                wrong = str(error)
            if not _any(world, wrong):
                if world.is_main:
                    set_aside([Path(one) for one in candidates[: candidates.index(text)]])
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
                other = "with another optim.name or model.dtype" if what == "dtype" else "from another model"
                raise CheckpointError(
                    f"{step_folder}: {name} has {what} {there}, this run needs {here}; it was saved {other}"
                )
    return names


def _some(names: list[str]) -> str:
    return ", ".join(name[:200] for name in names[:3]) + (
        f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
    )


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
