"""Any format to any other: open, make the parts of the destination in several processes, prove it, rename it.

The destination is made in a hidden folder beside it and appears whole. A conversion that was killed goes on where it
was; what is done stands in a journal in that folder. Memory: portions of a few megabytes in each process, whatever the
size of the model, unless a format has to hold a tensor.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatune import __version__
from megatune.checkpoint.convert import formats
from megatune.checkpoint.convert.base import Format, Job, Line, Opened, Options, Target
from megatune.checkpoint.convert.digest import (
    DIGEST,
    Blocks,
    Digested,
    complete,
    describe,
    differences,
    size_of,
)
from megatune.checkpoint.convert.disk import Syncing
from megatune.checkpoint.convert.journal import Journal, identity
from megatune.checkpoint.convert.names import cast, check_tied, whole_model
from megatune.checkpoint.convert.pool import Task, run
from megatune.checkpoint.convert.progress import Progress
from megatune.checkpoint.sources import TensorSource, read_json
from megatune.errors import CheckpointError, ConfigError

DIGESTS = "megatune-digests.json"
_FORMAT = 2
_SPARE_BYTES = 64 << 20
_BYTES_PER_WORKER = 512 << 20

Digests = dict[str, dict[str, Any]]  # "weights" or a slot -> name -> shape, dtype, digest


@dataclass(frozen=True)
class Result:
    """`tensors`, `bytes`: of weights and optimizer states, as they were written. `report`: a line for each tensor, and
    for those that were left out. `resumed`: jobs that an earlier, killed conversion had finished. `verified`: the
    destination was read back and is what was read from the source."""

    source: Path
    kind: str
    destination: Path
    to: str
    step: int | None
    tensors: int
    bytes: int
    report: list[Line]
    resumed: int = 0
    verified: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class _Work:
    """What a worker needs to open source and destination on its own."""

    source: Path
    source_format: str
    to: str
    options: Options
    folder: Path
    _open: dict[str, Any] = field(default_factory=dict, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # files are opened anew in each process

    def opened(self) -> Opened:
        if "source" not in self._open:
            self._open["source"] = open_source(self.source, self.source_format, self.to, self.options)
        return self._open["source"]

    def written(self) -> Opened:
        if "written" not in self._open:
            self._open["written"] = _reopened(self.folder, self.to, self.options)
        return self._open["written"]

    def target(self) -> tuple[Target, dict[str, Digested]]:
        """The target, reading through hashes."""
        if "target" not in self._open:
            opened = self.opened()
            hashed = {section: Digested(source) for section, source in sections(opened).items()}
            watched = replace(
                opened,
                weights=hashed["weights"],
                optimizer={slot: hashed[slot] for slot in opened.optimizer},
            )
            self._open["target"] = formats.named(self.to).target(watched, self.options), hashed
        return self._open["target"]

    def do(self, task: Task, passed: Callable[[int], None]) -> Any:
        kind, *rest = task
        try:
            return getattr(self, f"_{kind}")(*rest, passed)
        except OSError as error:
            raise _not_written(error, self.folder) from error

    def _make(self, job: Job, passed: Callable[[int], None]) -> Any:
        target, hashed = self.target()
        for source in hashed.values():
            source.passed = passed
        known = len(target.report)
        target.make(job, self.folder)
        lines = [asdict(line) for line in target.report[known:]]
        return {"blocks": {section: source.take() for section, source in hashed.items()}, "lines": lines}

    def _complete(self, section: str, name: str, found: Blocks, passed: Callable[[int], None]) -> Any:
        return complete(sections(self.opened())[section], name, found, passed)

    def _check(self, section: str, name: str, passed: Callable[[int], None]) -> Any:
        source = sections(self.written())[section]
        return describe(source, name, complete(source, name, {}, passed))


def open_source(path: Path, source_format: str, to: str, options: Options) -> Opened:
    """What of a source goes into a format `to`, under the names of a whole model, in the dtype that is asked for."""
    source, target = formats.named(source_format), formats.named(to)
    opened = source.open(path, options)
    if options.adapter is not None and source.name != "peft":
        from megatune.checkpoint.convert.peft import merged

        opened = merged(opened, Path(options.adapter))
    if not options.optimizer:
        opened = replace(opened, optimizer={})
    if target.takes is not None:
        opened = target.takes(opened, options)
    return cast(whole_model(opened) if target.checks_names else opened, options.dtype)


def sections(opened: Opened) -> dict[str, TensorSource]:
    """Weights and optimizer slots by name."""
    return {"weights": opened.weights, **opened.optimizer}


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    to: str,
    options: Options | None = None,
    *,
    verify: bool = False,
    workers: int | None = None,
    source_format: str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Convert the checkpoint at `source` to the format `to` as the folder `destination`.

    `workers`: processes, default as many as this process may use cores. `source_format`: default: found out.
    `verify`: read the destination back and compare every tensor; where the same conversion is finished already, only
    that. Beside the weights the folder gets DIGESTS: a digest for each tensor, and what became of it.

    Raises CheckpointError where the source is damaged, incomplete or of another model than its config, a tensor has no
    place, the disk is too small, or the destination is there and is something else; ConfigError for formats and options
    that do not exist.
    """
    began = time.monotonic()
    options, progress = options or Options(), progress or Progress(quiet=True)
    source, destination = Path(source).expanduser(), Path(destination).expanduser().absolute()
    known = formats.named(source_format) if source_format else formats.find(source)
    target_format = formats.named(to)
    if target_format.target is None:
        raise ConfigError(
            f"--to {to}: {target_format.title} can only be read; choose {', '.join(formats.targets())}"
        )
    work = _Work(source, known.name, to, options, destination)
    opened = work.opened()
    if destination.resolve().is_relative_to(opened.path.resolve()):
        raise CheckpointError(f"{destination}: lies in the source; name a folder beside it")
    words = {"to": to, "options": asdict(options), "format": _FORMAT, "version": __version__}
    mark = identity(opened.path, words)
    workers = workers or _workers(opened)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        return _again(destination, mark, work, verify, workers, progress, began)
    journal = Journal(destination, mark, str(source))
    try:
        result = _convert(journal, replace(work, folder=journal.folder), workers, verify, progress, mark)
        journal.publish(destination)
    finally:
        journal.close()
    return replace(result, destination=destination, seconds=time.monotonic() - began)


def _workers(opened: Opened) -> int:
    """All cores that this process may use, but fewer for what is done before they have started."""
    total = sum(size_of(part, name) for part in sections(opened).values() for name in part.names())
    return min(len(os.sched_getaffinity(0)), 1 + total // _BYTES_PER_WORKER)


def _convert(
    journal: Journal, work: _Work, workers: int, verify: bool, progress: Progress, mark: str
) -> Result:
    opened = work.opened()
    check_tied(opened, formats.named(work.source_format).open(work.source, work.options).weights)
    target, _ = work.target()
    jobs = {f"{job.file}#{job.part}": job for job in target.jobs()}
    resumed = len(journal.finished.keys() & jobs.keys())
    left = [job for key, job in jobs.items() if key not in journal.finished]
    _check_space(journal.folder, sum(job.size for job in left))
    total = sum(size_of(part, name) for part in sections(opened).values() for name in part.names())
    progress.start(f"{opened.kind} -> {work.to}", sum(job.size for job in jobs.values()))
    progress.add(sum(job.size for key, job in jobs.items() if key in journal.finished))
    _make(journal, work, left, workers, progress)
    digests = _digests(work, [journal.finished[key] for key in jobs], workers, progress)
    target.finish(journal.folder)
    lines = _report(opened, target, [journal.finished[key] for key in jobs])
    if verify:
        progress.start("verify", total)
        _verify(replace(work, _open={}), digests, workers, progress)
    _write(journal.folder, work, opened, mark, digests, lines)
    progress.stop()
    count = sum(len(part) for part in digests.values())
    return Result(
        work.source, opened.kind, journal.folder, work.to, opened.step, count, total, lines, resumed, verify
    )


def _make(journal: Journal, work: _Work, jobs: list[Job], workers: int, progress: Progress) -> None:
    """Do jobs; the journal says so once what they wrote is on disk, for which no worker waits."""
    try:
        with Syncing() as syncing:
            for (_, job), result in run(work, [("make", job) for job in jobs], workers, progress.add):
                key = f"{job.file}#{job.part}"
                syncing.add(journal.folder / job.file, partial(journal.add, key, result))
    except OSError as error:
        raise _not_written(error, journal.folder) from error


def _not_written(error: OSError, folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{error.filename or folder}: {error.strerror or error}; run the same command again to go on once that is "
        "mended"
    )


def _digests(work: _Work, results: list[Any], workers: int, progress: Progress) -> Digests:
    """Digests of all tensors, from the blocks that jobs saw; what none saw whole is read again."""
    found: dict[tuple[str, str], Blocks] = {}
    for result in results:
        for section, tensors in result["blocks"].items():
            for name, blocks in tensors.items():
                into = found.setdefault((section, name), {})
                into.update({int(number): value for number, value in blocks.items()})
    parts = sections(work.opened())
    tasks = []
    for section, source in parts.items():
        for name in sorted(source.names()):
            blocks = found.setdefault((section, name), {})
            if len(blocks) * 4 * 2**20 < size_of(source, name):
                tasks.append(("complete", section, name, blocks))
    if tasks:
        progress.start("digests", sum(size_of(parts[section], name) for _, section, name, _ in tasks))
    for (_, section, name, _), blocks in run(work, tasks, workers, progress.add):
        found[section, name].update({int(number): value for number, value in blocks.items()})
    return {
        section: {name: describe(source, name, found[section, name]) for name in sorted(source.names())}
        for section, source in parts.items()
    }


def _verify(work: _Work, expected: Mapping[str, Any], workers: int, progress: Progress) -> None:
    """Raise CheckpointError that names the first tensor of the destination that is not what was read."""
    for file in work.folder.rglob("*"):
        if file.is_file():
            _forget(file)
    written = sections(work.written())
    tasks = [
        ("check", section, name)
        for section, source in written.items()
        for name in sorted(source.names())
        if section in expected
    ]
    actual: Digests = {section: {} for section in written}
    for (_, section, name), facts in run(work, tasks, workers, progress.add):
        actual[section][name] = facts
    for section, tensors in expected.items():
        wrong = differences(tensors, actual.get(section, {}))
        if wrong:
            before, after = tensors.get(wrong[0]), actual.get(section, {}).get(wrong[0])
            raise CheckpointError(
                f"{work.folder}: {len(wrong)} of {len(tensors)} tensors ({section}) are not what was read from "
                f"the source, the first is {wrong[0]} ({_facts(after)} there, {_facts(before)} in the source); "
                "remove the folder and convert again, and if that does not help, report it"
            )


def _facts(facts: Mapping[str, Any] | None) -> str:
    return "nothing" if facts is None else f"{facts['dtype']} {facts['shape']} {facts[DIGEST][:12]}"


def _reopened(folder: Path, to: str, options: Options) -> Opened:
    """The destination, by its own reader."""
    written: Format = formats.named(to)
    opened = (written.reopen or written.open)(folder, replace(options, step=None, adapter=None, dtype=None))
    return whole_model(opened) if written.checks_names else opened


def _again(
    destination: Path, mark: str, work: _Work, verify: bool, workers: int, progress: Progress, began: float
) -> Result:
    """The destination is there: fine where it is that of the same conversion, which is then verified."""
    notes = read_json(destination / DIGESTS) if (destination / DIGESTS).is_file() else {}
    if notes.get("identity") != mark:
        raise CheckpointError(
            f"{destination}: is there already and holds something else; name another folder"
        )
    digests = notes["tensors"]
    total = sum(size_of(part, name) for part in sections(work.opened()).values() for name in part.names())
    if verify:
        progress.start("verify", total)
        _verify(work, digests, workers, progress)
        progress.stop()
    lines = [Line(**line) for line in notes["report"]]
    count = sum(len(part) for part in digests.values())
    kind, step, seconds = notes["source"]["format"], notes["source"]["step"], time.monotonic() - began
    resumed = notes["jobs"]
    return Result(
        work.source, kind, destination, work.to, step, count, total, lines, resumed, verify, seconds
    )


def _report(opened: Opened, target: Target, results: list[Any]) -> list[Line]:
    """A line for each tensor: what readers and writers say, and "mapped" for those of which they say nothing."""
    said = [*opened.report, *target.report]
    said += [Line(**line) for result in results for line in result["lines"]]
    names = {line.tensor for line in said if line.what != "skipped"}
    mapped = [Line(name, "mapped") for name in sorted(opened.weights.names() - names)]
    return list(dict.fromkeys([*said, *mapped]))


def _write(folder: Path, work: _Work, opened: Opened, mark: str, digests: Digests, lines: list[Line]) -> None:
    jobs = len(work.target()[0].jobs())
    notes = {
        "format": _FORMAT,
        "megatune": __version__,
        "identity": mark,
        "source": {"path": str(work.source.absolute()), "format": opened.kind, "step": opened.step},
        "to": work.to,
        "jobs": jobs,
        "digest": "XXH3-128 of the XXH3-128s of each 4 MiB block of the row-major little-endian values",
        "tensors": digests,
        "report": [asdict(line) for line in lines],
    }
    (folder / DIGESTS).write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE_BYTES:
        raise CheckpointError(
            f"{folder.parent}: has {free / 2**30:.2f} GiB free and the conversion writes {needed / 2**30:.2f} GiB; "
            "free space or name another place"
        )


def _forget(file: Path) -> None:
    """Drop a file from the page cache (a hint): what is verified is what the disk has."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
