"""Reading what a run's jobs wrote: each job's output, and each rank's and node's log, start by start."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from megatune.errors import ConfigError
from megatune.launch.slurm.submission import Submission

_PAUSE = 0.5
_CHUNK = 2**20
# Terminals obey these; what a run wrote must not move a reader's cursor or rename his window.
_CONTROLS = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")


def job_output(submission: Submission, job: str) -> Path:
    """What the job's script and its agents said."""
    return submission.folder / "slurm" / f"{job}.out"


def job_logs(submission: Submission, job: str) -> Path:
    """Folder of the logs of one job's starts (`gen-<generation>/`)."""
    return submission.folder / "logs" / f"slurm-{job}"


def files(submission: Submission, name: str | None) -> list[Path]:
    """Files of that name (`rank-00003.log`) of all starts of all jobs, oldest first; None: the jobs' own outputs."""
    found: list[Path] = []
    for job in submission.jobs:
        if name is None:
            found.append(job_output(submission, job))
            continue
        starts = sorted(job_logs(submission, job).glob("gen-*"), key=_generation)
        found += [start / name for start in starts]
    return [path for path in found if path.is_file()]


def _generation(path: Path) -> int:
    number = path.name.removeprefix("gen-")
    return int(number) if number.isdecimal() else -1


@dataclass
class Source:
    """One stream over several files: `label` goes before each line; `name`: see `files`."""

    submission: Submission
    name: str | None
    label: bytes = b""
    _path: Path | None = None
    _at: int = 0
    _rest: bytes = b""
    _done: set[Path] = field(default_factory=set)

    def start_at_the_end(self, lines: int) -> None:
        """Skip all but the last `lines` lines of the newest file."""
        paths = files(self.submission, self.name)
        if not paths:
            return
        self._done = set(paths[:-1])
        self._path = paths[-1]
        self._at = _last_lines(self._path, lines)

    def read(self) -> Iterator[bytes]:
        """Whole lines that are new, in order; a start's last line also without its end once the next start is there."""
        while True:
            if self._path is not None:
                yield from self._more()
            following = [
                path
                for path in files(self.submission, self.name)
                if path not in self._done and path != self._path
            ]
            if not following:
                return
            if self._path is not None:
                yield from self.rest()
                self._done.add(self._path)
            self._path, self._at = following[0], 0

    def rest(self) -> Iterator[bytes]:
        """A last line that has no end."""
        if self._rest:
            yield self.label + self._rest + b"\n"
        self._rest = b""

    def _more(self) -> Iterator[bytes]:
        with open(self._path, "rb") as file:
            file.seek(self._at)
            while data := file.read(_CHUNK):
                self._at += len(data)
                *lines, self._rest = (self._rest + data).split(b"\n")
                yield from (self.label + line + b"\n" for line in lines)


def _last_lines(path: Path, lines: int) -> int:
    """Where the last `lines` lines of a file begin."""
    with open(path, "rb") as file:
        end = at = file.seek(0, 2)
        seen, tail = 0, b""
        while at and seen <= lines:
            step = min(_CHUNK, at)
            at -= step
            file.seek(at)
            tail = file.read(step) + tail
            seen = tail.count(b"\n", 0, len(tail) - 1) + 1
    kept = tail.split(b"\n")
    body = kept[:-1] if kept and kept[-1] == b"" else kept
    return (
        end - sum(len(line) + 1 for line in body[-lines:]) + (0 if kept[-1] == b"" else 1) if lines else end
    )


def show(
    submission: Submission,
    names: Sequence[tuple[str | None, str]],
    *,
    lines: int,
    follow: bool,
    is_over: Callable[[], bool],
    out: BinaryIO | None = None,
) -> None:
    """Print the last `lines` lines of each log, and with `follow` what comes until `is_over`, over new
    starts and jobs.

    `names`: (name as in `files`, label). Raises ConfigError where there is no such log and nothing more will come.
    """
    target = out or sys.stdout.buffer
    sources = [
        Source(submission, name, f"[{label}] ".encode() if len(names) > 1 else b"") for name, label in names
    ]
    if not follow:
        missing = [label for (name, label) in names if not files(submission, name)]
        if missing:
            raise ConfigError(
                f"{submission.folder}: there is no log of {', '.join(missing)} yet; see megatune slurm status"
            )
    for source in sources:
        source.start_at_the_end(lines)
    while True:
        over = not follow or is_over()
        for source in sources:
            _write(target, source.read())
        if over:
            for source in sources:
                _write(target, source.rest())
            return
        time.sleep(_PAUSE)


def _write(target: BinaryIO, lines: Iterator[bytes]) -> None:
    for line in lines:
        target.write(_CONTROLS.sub(b"", line.replace(b"\r", b"\n").rstrip(b"\n")) + b"\n")
    target.flush()
