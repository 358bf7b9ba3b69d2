"""A copy of the state in host memory, from which a save is written while training goes on.

The copy lies in one block, in the order of the file: allocated (and for a GPU page-locked) once, used by every save,
and exactly as large as the state, where PyTorch's own pinned memory would be rounded up to a power of two.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import psutil
import torch
from torch import Tensor

from megatune.checkpoint.plan import Plan
from megatune.errors import CheckpointError

SLAB_BYTES = 16 * 2**20  # what is written at a time
# Page-locking holds the driver's lock: in pieces, so that the steps beside it can launch their kernels in between.
_LOCK_BYTES = 256 * 2**20
_SHARE_OF_FREE = 0.9


class HostBuffer:
    """`size` bytes of host memory (`bytes`: uint8 [size]), page-locked where `pinned`; released with the object."""

    def __init__(self, size: int, *, pinned: bool) -> None:
        # Own pages, not a heap's: page-locked pieces must not share any.
        memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8)[:size]
        self._locked: list[int] = []
        # Not at the interpreter's exit: the driver is gone by then, and the memory with the process.
        weakref.finalize(self, _unlock, self._locked).atexit = False
        for start in range(0, size if pinned else 0, _LOCK_BYTES):
            self._lock(self.bytes[start : start + _LOCK_BYTES])

    def _lock(self, part: Tensor) -> None:
        part.zero_()  # with all threads; the driver alone would touch page after page
        result = torch.cuda.cudart().cudaHostRegister(part.data_ptr(), part.numel(), 0)
        if int(result) != 0:
            raise CheckpointError(
                f"{part.numel()} bytes of host memory cannot be page-locked for checkpoints (CUDA error "
                f"{int(result)}); raise the limit of locked memory (ulimit -l)"
            )
        self._locked.append(part.data_ptr())


def _unlock(pointers: list[int]) -> None:
    for pointer in pointers:
        torch.cuda.cudart().cudaHostUnregister(pointer)


class Staging:
    """Where the saves of one plan copy to. `is_direct`: there is not enough memory for a copy, so that training has to
    wait until the file is written from the live state."""

    def __init__(self, plan: Plan, *, is_direct: bool = False) -> None:
        self.is_direct = is_direct
        self._plan = plan
        self._devices = sorted(
            {piece.tensor.device for piece in plan.pieces if piece.tensor.is_cuda}, key=str
        )
        self._streams = {device: torch.cuda.Stream(device) for device in self._devices}
        self._buffer: HostBuffer | None = None
        self._lock = threading.Lock()

    def allocate(self) -> None:
        """Get the memory now (page-locking takes seconds), in any thread. Raises CheckpointError."""
        with self._lock:
            if self._buffer is not None or self.is_direct:
                return
            # A new thread's device is the first one; page-locking would make a context there.
            with torch.cuda.device(self._devices[0]) if self._devices else nullcontext():
                self._buffer = HostBuffer(self._plan.size, pinned=bool(self._devices))

    def now(self) -> list[torch.cuda.Event]:
        """Marks on each device what has been queued so far, by the calling thread."""
        return [torch.cuda.current_stream(device).record_event() for device in self._devices]

    @torch.no_grad()
    def copy(self, after: list[torch.cuda.Event]) -> None:
        """Copy the state as it is once `after` has come; the copy is finished when this returns. A GPU copies beside
        its other work."""
        self.allocate()
        self._wait_for(after)
        for piece in self._plan.pieces:
            place = self._buffer.bytes[piece.offset : piece.offset + piece.tensor.nbytes]
            if piece.tensor.is_cuda:
                with torch.cuda.stream(self._streams[piece.tensor.device]):
                    flat = piece.tensor.contiguous().view(-1).view(torch.uint8)
                    for start, stop in _within_locks(piece.offset, piece.tensor.nbytes):
                        place[start:stop].copy_(flat[start:stop], non_blocking=True)
            else:
                place.view(piece.tensor.dtype).view(piece.tensor.shape).copy_(piece.tensor)
        self._synchronize()

    def copied(self) -> Iterator[memoryview]:
        """The copy in slabs, in the order of the file."""
        whole = memoryview(self._buffer.bytes.numpy())
        for start in range(0, len(whole), SLAB_BYTES):
            yield whole[start : start + SLAB_BYTES]

    @torch.no_grad()
    def live(self, after: list[torch.cuda.Event]) -> Iterator[memoryview]:
        """The state itself in slabs, once `after` has come. Each is valid until the next."""
        self._wait_for(after)
        bounce = torch.empty(SLAB_BYTES, dtype=torch.uint8, pin_memory=True) if self._devices else None
        for piece in self._plan.pieces:
            flat = piece.tensor.reshape(-1)
            per_slab = SLAB_BYTES // flat.element_size()
            for start in range(0, flat.numel(), per_slab):
                part = flat[start : start + per_slab]
                if part.is_cuda:
                    host = bounce[: part.nbytes].view(part.dtype)
                    with torch.cuda.stream(self._streams[part.device]):
                        host.copy_(part, non_blocking=True)
                    self._streams[part.device].synchronize()
                    part = host
                yield memoryview(part.contiguous().view(torch.uint8).numpy())

    def _wait_for(self, after: list[torch.cuda.Event]) -> None:
        for device, event in zip(self._devices, after, strict=True):
            self._streams[device].wait_event(event)

    def _synchronize(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()


def _within_locks(offset: int, size: int) -> Iterator[tuple[int, int]]:
    """[0, size) at `offset` of a buffer, in parts that lie in one page-locked piece each: a driver's copy fails where
    its memory was locked in two."""
    start = 0
    while start < size:
        stop = min(size, start + _LOCK_BYTES - (offset + start) % _LOCK_BYTES)
        yield start, stop
        start = stop


def fits(size: int) -> bool:
    """Whether the machine has room for a copy of `size` bytes in each of its processes."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return size * processes <= _SHARE_OF_FREE * free_memory()


def free_memory() -> int:
    """Bytes of host memory that processes here may still take: the machine's, and their control group's (v2)."""
    free = psutil.virtual_memory().available
    top = Path("/sys/fs/cgroup")
    try:
        name = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip().lstrip("/")
    except OSError:
        return free
    for group in [top / name, *(top / name).parents]:
        if not group.is_relative_to(top):
            break
        free = min(free, _free_in(group, free))
    return free


def _free_in(group: Path, otherwise: int) -> int:
    try:
        limit, used = (group / "memory.max").read_text().strip(), (group / "memory.current").read_text()
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return otherwise
    if limit == "max":
        return otherwise
    cached = int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))  # given back when needed
    return int(limit) - int(used) + cached
