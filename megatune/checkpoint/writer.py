"""Writing one checkpoint: a copy of the state, each process's file, and the step that makes it real.

The processes agree through the file system alone, so that nothing in the background ever waits in a collective:

1. Main threads: rank 0 makes a hidden folder `.step-000120.<nonce>` and broadcasts its name; every process copies its
   part of the state to host memory. Training goes on.
2. Every process: write `rank-00000.safetensors`, sync it, read it back against its checksums, then write
   `rank-00000.json` (what is in it) by rename.
3. Rank 0: wait for all of these, check that the boxes cover every tensor, write `run.json` and `manifest.json`, sync
   everything, rename the folder to `step-000120`, sync the parent, prune older checkpoints.

A process that fails says so in `rank-00001.failed`; rank 0 then removes the hidden folder and leaves a note beside it
for the others. Whatever dies at whatever point: the folder `step-000120` is there with all its bytes or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatune.checkpoint import files
from megatune.checkpoint.boxes import whole_box
from megatune.checkpoint.manifest import (
    DTYPE_NAMES,
    MANIFEST,
    RUN,
    BlockChecksums,
    Chunk,
    FileEntry,
    Manifest,
    TensorEntry,
    dump_manifest,
    file_from_json,
    file_to_json,
    tensor_from_json,
    tensor_to_json,
)
from megatune.checkpoint.reader import CheckpointFile
from megatune.errors import CheckpointError
from megatune.parallel.shard import Box, Parts

_log = logging.getLogger(__name__)

_WRITE_BYTES = 16 * 2**20
_POLL_SECONDS = (0.005, 0.25)


@dataclass(frozen=True)
class Piece:
    """A tensor that this process writes under `key`: its part `box` of the global tensor `name`."""

    key: str
    name: str
    tensor: Tensor
    box: Box
    global_shape: tuple[int, ...]


@dataclass
class Job:
    """One process's share of one save. `run_text`: run.json (rank 0's is written); `shared_digest`: of the names,
    shapes and dtypes of plain tensors, which must be the same on all processes; `after`: called by rank 0 once the
    checkpoint is there; `timeout`: seconds rank 0 waits for the next process to finish its file."""

    temporary: Path
    final: Path
    step: int
    rank: int
    world_size: int
    pieces: Sequence[Piece]
    shared_digest: str
    run_text: bytes
    after: Callable[[], None]
    timeout: float

    @property
    def replaced(self) -> Path:
        """Where a folder goes that already has the final name."""
        return self.temporary.with_name(self.temporary.name + ".replaced")

    @property
    def failed(self) -> Path:
        """The note that rank 0 leaves for the others when there will be no checkpoint."""
        return self.temporary.with_name(self.temporary.name + ".failed")


class PendingSave:
    """A save under way. `check()` raises CheckpointError once it failed (and only once), `wait()` also waits for the
    end: the checkpoint is there, and older ones are pruned, when it returns. `is_done`: finished, well or not."""

    def __init__(self, job: Job, *, background: bool) -> None:
        self.folder = job.final
        self._error: CheckpointError | None = None
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

    def wait(self) -> None:
        """Wait until the checkpoint is there. Raises CheckpointError where it failed."""
        if self._thread.is_alive():
            self._thread.join()
        self.check()

    def _run(self, job: Job) -> None:
        try:
            _write_and_publish(job)
        except Exception as error:  # re-raised in the main thread
            if isinstance(error, CheckpointError):
                self._error = error
                return
            self._error = CheckpointError(_explain(job, error))
            self._error.__cause__ = error


def plan(state: Mapping[str, Tensor | Parts], rank: int, world_size: int) -> tuple[list[Piece], str]:
    """(what this process writes, digest of the plain tensors). Of `Parts`, the process that `writes` them does; plain
    tensors are the same everywhere and are dealt out by size."""
    mine: list[Piece] = []
    shared: list[Piece] = []
    for name, value in state.items():
        if isinstance(value, Tensor):
            shared.append(Piece(name, name, value.detach(), whole_box(value.shape), tuple(value.shape)))
        elif value.writes:
            for index, (box, tensor) in enumerate(value.parts):
                key = f"{name}#{index}" if index else name
                mine.append(Piece(key, name, tensor.detach(), box, value.shape))
    for piece in (*mine, *shared):
        if piece.tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{piece.name}: tensors of dtype {piece.tensor.dtype} cannot be saved")
    shared.sort(key=lambda piece: (-piece.tensor.nbytes, piece.name))
    loads = [0] * world_size
    for piece in shared:
        writer = loads.index(min(loads))
        loads[writer] += max(1, piece.tensor.nbytes)
        if writer == rank:
            mine.append(piece)
    text = json.dumps([(piece.name, piece.global_shape, DTYPE_NAMES[piece.tensor.dtype]) for piece in shared])
    return mine, hashlib.sha256(text.encode()).hexdigest()


_pinned: dict[str, Tensor] = {}  # host buffers of the last save from a GPU: pinning costs more than the copy


def snapshot(pieces: Sequence[Piece], *, copy: bool) -> list[Piece]:
    """The pieces in host memory, safe from later changes where `copy` (host tensors are used as they are where not).

    From a GPU: into pinned buffers that the next save uses again, so one save at a time. All copies are finished when
    this returns.
    """
    copies, buffers, devices = [], {}, set()
    for piece in pieces:
        tensor = piece.tensor
        if tensor.is_cuda:
            devices.add(tensor.device)
            host = _pinned.get(piece.key)
            if host is None or host.shape != tensor.shape or host.dtype != tensor.dtype:
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
            buffers[piece.key] = host
        else:
            contiguous = tensor.cpu().contiguous()
            owns = contiguous.data_ptr() != tensor.data_ptr()
            host = contiguous.clone() if copy and not owns else contiguous
        copies.append(replace(piece, tensor=host))
    for device in devices:
        torch.cuda.synchronize(device)
    _pinned.clear()
    _pinned.update(buffers)
    # safetensors has no padding: elements stay aligned if the widest dtypes come first.
    return sorted(copies, key=lambda piece: (-piece.tensor.element_size(), piece.key))


def _write_and_publish(job: Job) -> None:
    try:
        report = _write_own_file(job)
        _leave_note(job.temporary / f"rank-{job.rank:05d}.json", json.dumps(report))
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


def _write_own_file(job: Job) -> dict[str, Any]:
    """Write and read back this process's tensors; returns what `rank-k.json` says about them."""
    report: dict[str, Any] = {"shared": job.shared_digest, "files": {}, "tensors": {}}
    if not job.pieces:
        return report
    name = f"rank-{job.rank:05d}.safetensors"
    entry = _write_tensors(job.temporary / name, job.pieces)
    report["files"][name] = file_to_json(entry)
    tensors: dict[str, TensorEntry] = {}
    for piece in job.pieces:
        known = tensors[piece.name].chunks if piece.name in tensors else ()
        chunks = (*known, Chunk(name, piece.key, piece.box))
        tensors[piece.name] = TensorEntry(piece.tensor.dtype, piece.global_shape, chunks)
    report["tensors"] = {name: tensor_to_json(entry) for name, entry in tensors.items()}
    return report


def _write_tensors(path: Path, pieces: Sequence[Piece]) -> FileEntry:
    """A safetensors file (https://github.com/huggingface/safetensors#format), synced and read back."""
    header: dict[str, Any] = {}
    offset = 0
    for piece in pieces:
        stop = offset + piece.tensor.nbytes
        shape = list(piece.tensor.shape)
        header[piece.key] = {
            "dtype": DTYPE_NAMES[piece.tensor.dtype],
            "shape": shape,
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    checksums = BlockChecksums()
    descriptor = files.create(path)
    try:
        _append(descriptor, struct.pack("<Q", len(text)) + text, checksums)
        for piece in pieces:
            raw = (
                memoryview(piece.tensor.reshape(-1).view(torch.uint8).numpy())
                if piece.tensor.numel()
                else b""
            )
            for start in range(0, len(raw), _WRITE_BYTES):
                _append(descriptor, raw[start : start + _WRITE_BYTES], checksums)
        files.sync(descriptor)
    finally:
        files.close(descriptor)
    entry = checksums.entry()
    files.forget_cached(path)  # so that the disk's bytes are read back, not the page cache's
    CheckpointFile(path, entry).verify_all()
    return entry


def _append(descriptor: int, data: memoryview | bytes, checksums: BlockChecksums) -> None:
    checksums.add(data)
    files.write(descriptor, data)


def _publish(job: Job) -> None:
    """Rank 0: from everyone's files to a checkpoint."""
    reports = _collect_reports(job)
    if len({report["shared"] for report in reports}) > 1:
        raise CheckpointError(
            f"step {job.step}: the processes do not hold the same plain tensors; nothing was saved"
        )
    manifest = _merge(job, reports)
    manifest.check()
    for name, entry in manifest.files.items():
        path = job.temporary / name
        if name != RUN and path.stat().st_size != entry.size:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes instead of {entry.size}; nothing was saved"
            )
    files.write_whole(job.temporary / RUN, job.run_text)
    for rank in range(job.world_size):
        files.remove_file(job.temporary / f"rank-{rank:05d}.json")
    files.write_whole(job.temporary / MANIFEST, dump_manifest(manifest))
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


def _collect_reports(job: Job) -> list[dict[str, Any]]:
    """Everyone's `rank-k.json`, as they come in. Raises CheckpointError where one failed or none comes in time."""
    waiting = set(range(job.world_size))
    reports: dict[int, dict[str, Any]] = {}
    deadline = time.monotonic() + job.timeout
    pause = _POLL_SECONDS[0]
    while waiting:
        names = {entry.name for entry in job.temporary.iterdir()}
        for rank in sorted(waiting):
            if f"rank-{rank:05d}.failed" in names:
                raise CheckpointError((job.temporary / f"rank-{rank:05d}.failed").read_text("utf-8"))
            if f"rank-{rank:05d}.json" in names:
                reports[rank] = json.loads((job.temporary / f"rank-{rank:05d}.json").read_bytes())
                deadline = time.monotonic() + job.timeout
        waiting -= reports.keys()
        if waiting and time.monotonic() > deadline:
            raise CheckpointError(
                f"step {job.step} was not saved: no file of rank {min(waiting)} came within {job.timeout:g} s in "
                f"{job.final.parent}; is this folder on a file system that all nodes share?"
            )
        if waiting:
            time.sleep(pause)
            pause = min(2 * pause, _POLL_SECONDS[1])
    return [reports[rank] for rank in range(job.world_size)]


def _merge(job: Job, reports: Sequence[dict[str, Any]]) -> Manifest:
    run = BlockChecksums()
    run.add(job.run_text)
    entries: dict[str, FileEntry] = {RUN: run.entry()}
    tensors: dict[str, TensorEntry] = {}
    for rank, report in enumerate(reports):
        entries.update({name: file_from_json(data) for name, data in report["files"].items()})
        for name, data in report["tensors"].items():
            entry = tensor_from_json(data)
            known = tensors.get(name)
            if known is not None:
                if (known.dtype, known.shape) != (entry.dtype, entry.shape):
                    raise CheckpointError(
                        f"{name} is {entry.dtype} {entry.shape} on rank {rank}, {known.dtype} {known.shape} elsewhere; "
                        f"nothing was saved"
                    )
                entry = TensorEntry(entry.dtype, entry.shape, known.chunks + entry.chunks)
            tensors[name] = entry
    return Manifest(job.step, tensors, entries)


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
                _leave_note(job.temporary / f"rank-{job.rank:05d}.failed", text)
            return
        if job.world_size > 1:
            _leave_note(job.failed, text)
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


def _leave_note(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name.lstrip('.')}.unfinished")
    files.write_whole(unfinished, text.encode())
    files.rename(unfinished, path)


def _explain(job: Job, error: Exception) -> str:
    what = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
    return (
        f"step {job.step} was not saved: {what} in {job.final.parent} (rank {job.rank}); earlier checkpoints are "
        f"whole; free space or repair the folder, and start again"
    )
