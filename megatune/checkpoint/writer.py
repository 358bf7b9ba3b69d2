"""Writing one checkpoint: a copy of the state, each process's file, and the step that makes it real.

The processes agree through the file system alone, so that nothing in the background ever waits in a collective:

1. Main threads: rank 0 makes a hidden folder `.step-000120.<nonce>` and broadcasts its name. Training goes on.
2. Every process, in the background: copy its part of the state to host memory (training must not change the state
   before this is done: `PendingSave.wait_staged`), write `rank-00000.safetensors`, sync it, read it back against its
   checksums, then write `rank-00000.json` (what is in it) by rename.
3. Rank 0: wait for all of these, check that the boxes cover every tensor, write `run.json` and `manifest.json`, sync
   everything, rename the folder to `step-000120`, sync the parent, prune older checkpoints.

A process that fails says so in `rank-00001.failed`; rank 0 then removes the hidden folder and leaves a note beside it
for the others. Whatever dies at whatever point: the folder `step-000120` is there with all its bytes or not at all.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from megatune.checkpoint import files
from megatune.checkpoint.manifest import (
    MANIFEST,
    RUN,
    BlockChecksums,
    FileEntry,
    check_tensors,
    file_from_json,
    file_to_json,
    join_manifest,
    tensor_from_json,
)
from megatune.checkpoint.plan import Plan
from megatune.checkpoint.reader import CheckpointFile
from megatune.checkpoint.staging import Staging
from megatune.errors import CheckpointError

_log = logging.getLogger(__name__)

_POLL_SECONDS = (0.005, 0.25)


class Merged:
    """All processes' tensors as one part of a manifest, on rank 0. It stays the same from save to save, so that it is
    put together, and checked, once."""

    def __init__(self) -> None:
        self._digests: list[str] | None = None
        self._text = b""

    def text(self, notes: Sequence[Note]) -> bytes:
        """JSON of the manifest's tensors. Raises CheckpointError where the processes' tensors do not fit together."""
        digests = [note.digest for note in notes]
        if digests != self._digests:
            found: dict[str, dict[str, Any]] = {}
            for rank, note in enumerate(notes):
                for name, entry in json.loads(note.tensors).items():
                    known = found.setdefault(name, entry)
                    if known is not entry:
                        _check_same(name, known, entry, rank)
                        known["chunks"] += entry["chunks"]
            names = {name for note in notes for name in note.files}
            check_tensors({name: tensor_from_json(entry) for name, entry in found.items()}, names)
            self._text = json.dumps(dict(sorted(found.items()))).encode()
            self._digests = digests
        return self._text


def _check_same(name: str, known: dict[str, Any], entry: dict[str, Any], rank: int) -> None:
    there, here = ((one["dtype"], one["shape"]) for one in (known, entry))
    if there != here:
        raise CheckpointError(
            f"{name} is {here[0]} {here[1]} on rank {rank}, {there[0]} {there[1]} elsewhere; nothing was saved"
        )


@dataclass(frozen=True)
class Note:
    """What a process says about the file that it wrote: `rank-00000.json`, of two lines. `shared`, `digest`: as in its
    `Plan`; `files`: their sizes and checksums; `tensors`: JSON, as in its `Plan`."""

    shared: str
    digest: str
    files: dict[str, FileEntry]
    tensors: bytes

    def dump(self) -> bytes:
        files = {name: file_to_json(entry) for name, entry in self.files.items()}
        line = json.dumps({"shared": self.shared, "digest": self.digest, "files": files})
        return line.encode() + b"\n" + self.tensors

    @classmethod
    def parse(cls, text: bytes) -> Note:
        line, _, tensors = text.partition(b"\n")
        data = json.loads(line)
        files = {name: file_from_json(entry) for name, entry in data["files"].items()}
        return cls(data["shared"], data["digest"], files, tensors)


@dataclass
class Job:
    """One process's share of one save. `run_text`: run.json (rank 0's is written); `after`: called by rank 0 once the
    checkpoint is there; `timeout`: seconds rank 0 waits for the next process to finish its file. `copies`: write from a
    copy of the state, not from the state itself."""

    temporary: Path
    final: Path
    step: int
    rank: int
    world_size: int
    plan: Plan
    staging: Staging
    merged: Merged
    run_text: bytes
    after: Callable[[], None]
    timeout: float
    copies: bool
    queued: list[torch.cuda.Event] = field(default_factory=list)

    @property
    def replaced(self) -> Path:
        """Where a folder goes that already has the final name."""
        return self.temporary.with_name(self.temporary.name + ".replaced")

    @property
    def failed(self) -> Path:
        """The note that rank 0 leaves for the others when there will be no checkpoint."""
        return self.temporary.with_name(self.temporary.name + ".failed")


class PendingSave:
    """A save under way. `wait_staged()` comes before the state may change. `check()` raises CheckpointError once the
    save failed (and only once), `wait()` also waits for the end: the checkpoint is there, and older ones are pruned,
    when it returns. `is_done`: finished, well or not. `seconds`: from the start until the checkpoint was there; None
    before, and where it failed."""

    def __init__(self, job: Job, *, background: bool) -> None:
        self.folder = job.final
        self.seconds: float | None = None
        self._began = time.monotonic()
        self._error: CheckpointError | None = None
        self._staged = threading.Event()
        job.queued = job.staging.now()
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"save-{job.step}", daemon=True)
        if background:
            self._thread.start()
        else:
            self._thread.run()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def check(self) -> None:
        """Raise the error of a save that failed."""
        if self.is_done and self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait_staged(self) -> None:
        """Wait until the state may change: it is copied (or the save failed)."""
        self._staged.wait()

    def wait(self) -> None:
        """Wait until the checkpoint is there. Raises CheckpointError where it failed."""
        if self._thread.is_alive():
            self._thread.join()
        self.check()

    def _run(self, job: Job) -> None:
        try:
            _write_and_publish(job, self._staged)
            self.seconds = time.monotonic() - self._began
        except Exception as error:  # re-raised in the main thread
            if isinstance(error, CheckpointError):
                self._error = error
                return
            self._error = CheckpointError(_explain(job, error))
            self._error.__cause__ = error
        finally:
            self._staged.set()


def _write_and_publish(job: Job, staged: threading.Event) -> None:
    try:
        note = _write_own_file(job, staged)
        _leave_note(job.temporary / f"rank-{job.rank:05d}.json", note.dump())
        if job.rank == 0:
            _publish(job)
        else:
            _wait_for_publication(job)
    except Exception as error:
        if job.rank and job.failed.exists():  # rank 0 gave up and removed the folder under this one's hands
            raise CheckpointError(job.failed.read_text("utf-8")) from error
        _report_failure(job, error)
        raise
    if job.rank == 0:
        try:
            files.remove_tree(job.replaced)
            job.after()
        except OSError as error:
            _log.warning("%s is saved, but older checkpoints could not be removed: %s", job.final, error)


def _write_own_file(job: Job, staged: threading.Event) -> Note:
    """Copy, write and read back this process's tensors; what is said about them."""
    plan, entries = job.plan, {}
    if plan.pieces:
        if job.copies:
            job.staging.copy(job.queued)
            staged.set()
        slabs = job.staging.copied() if job.copies else job.staging.live(job.queued)
        path = job.temporary / plan.file
        entries[plan.file] = entry = _write_file(path, plan.header, slabs)
        staged.set()
        files.forget_cached(path)  # so that the disk's bytes are read back, not the page cache's
        CheckpointFile(path, entry).verify_all()
    staged.set()
    return Note(plan.shared_digest, plan.digest, entries, plan.tensors)


def _write_file(path: Path, header: bytes, slabs: Iterable[memoryview]) -> FileEntry:
    """A file, synced; the checksums of a slab are computed while it is written."""
    checksums = BlockChecksums()
    descriptor = files.create(path)
    try:
        with ThreadPoolExecutor(1) as beside:
            for slab in chain([memoryview(header)], slabs):
                adding = beside.submit(checksums.add, slab)
                files.write(descriptor, slab)
                adding.result()
                files.begin_sync(descriptor, checksums.size - len(slab), len(slab))
        files.sync(descriptor)
    finally:
        files.close(descriptor)
    return checksums.entry()


def _publish(job: Job) -> None:
    """Rank 0: from everyone's files to a checkpoint."""
    notes = _collect_notes(job)
    if len({note.shared for note in notes}) > 1:
        raise CheckpointError(
            f"step {job.step}: the processes do not hold the same plain tensors; nothing was saved"
        )
    tensors = job.merged.text(notes)
    entries = {name: entry for note in notes for name, entry in note.files.items()}
    for name, entry in entries.items():
        size = (job.temporary / name).stat().st_size
        if size != entry.size:
            raise CheckpointError(
                f"{job.temporary / name} has {size} bytes instead of {entry.size}; nothing was saved"
            )
    run = BlockChecksums()
    run.add(job.run_text)
    files.write_whole(job.temporary / RUN, job.run_text)
    for rank in range(job.world_size):
        files.remove_file(job.temporary / f"rank-{rank:05d}.json")
    text = join_manifest(job.step, entries | {RUN: run.entry()}, tensors)
    files.write_whole(job.temporary / MANIFEST, text)
    files.sync_folder(job.temporary)
    if job.final.exists():
        # The same step, damaged or from a start that went another way. A crash between the two renames leaves it
        # under the second name, and `store.clean` puts it back.
        files.rename(job.final, job.replaced)
    try:
        files.rename(job.temporary, job.final)
    except OSError:
        if job.replaced.exists():
            files.rename(job.replaced, job.final)
        raise
    files.sync_folder(job.final.parent)


def _collect_notes(job: Job) -> list[Note]:
    """Everyone's `rank-k.json`, as they come in. Raises CheckpointError where one failed or none comes in time."""
    waiting = set(range(job.world_size))
    notes: dict[int, Note] = {}
    deadline = time.monotonic() + job.timeout
    pause = _POLL_SECONDS[0]
    while waiting:
        names = {entry.name for entry in job.temporary.iterdir()}
        for rank in sorted(waiting):
            if f"rank-{rank:05d}.failed" in names:
                raise CheckpointError((job.temporary / f"rank-{rank:05d}.failed").read_text("utf-8"))
            if f"rank-{rank:05d}.json" in names:
                notes[rank] = Note.parse((job.temporary / f"rank-{rank:05d}.json").read_bytes())
                deadline = time.monotonic() + job.timeout
        waiting -= notes.keys()
        if waiting and time.monotonic() > deadline:
            raise CheckpointError(
                f"step {job.step} was not saved: no file of rank {min(waiting)} came within {job.timeout:g} s in "
                f"{job.final.parent}; is this folder on a file system that all nodes share?"
            )
        if waiting:
            time.sleep(pause)
            pause = min(2 * pause, _POLL_SECONDS[1])
    return [notes[rank] for rank in range(job.world_size)]


def _wait_for_publication(job: Job) -> None:
    """Other ranks: until rank 0 renamed the folder or gave up."""
    pause = _POLL_SECONDS[0]
    deadline = time.monotonic() + job.timeout * job.world_size  # rank 0's own limit is for each process
    while job.temporary.exists() and not job.failed.exists():
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"step {job.step} was not saved: rank 0 did not finish {job.temporary} in time"
            )
        time.sleep(pause)
        pause = min(2 * pause, _POLL_SECONDS[1])
    if job.failed.exists():
        raise CheckpointError(job.failed.read_text("utf-8"))
    if not (job.final / MANIFEST).exists():
        raise CheckpointError(f"step {job.step} was not saved: {job.temporary} disappeared")


def _report_failure(job: Job, error: Exception) -> None:
    """Tell the other processes; on rank 0 also remove what was written. `error` is what counts, so what fails here
    (the disk may be full) is only logged: dead folders are removed at the next start."""
    text = str(error) if isinstance(error, CheckpointError) else _explain(job, error)
    try:
        if job.rank:
            if job.temporary.exists():
                _leave_note(job.temporary / f"rank-{job.rank:05d}.failed", text.encode())
            return
        if job.world_size > 1:
            _leave_note(job.failed, text.encode())
    except OSError as second:
        _log.warning("the other processes could not be told that the save failed: %s", second)
    for _ in range(20):  # others may still be creating files in it
        try:
            files.remove_tree(job.temporary)
            return
        except OSError as second:
            last = second
            time.sleep(0.05)
    _log.warning("%s could not be removed: %s", job.temporary, last)


def _leave_note(path: Path, text: bytes) -> None:
    unfinished = path.with_name(f".{path.name.lstrip('.')}.unfinished")
    files.write_whole(unfinished, text)
    files.rename(unfinished, path)


def _explain(job: Job, error: Exception) -> str:
    what = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
    return (
        f"step {job.step} was not saved: {what} in {job.final.parent} (rank {job.rank}); earlier checkpoints are "
        f"whole; free space or repair the folder, and start again"
    )
