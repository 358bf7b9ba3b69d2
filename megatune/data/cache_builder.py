"""Makes entries of the token cache: reads, tokenises, packs, writes; streamed, in bounded memory."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from megatune.config.schema import Config
from megatune.data.cache import INDEX, Plan, open_entry, plan, splits
from megatune.data.encode import (
    NOTHING_LEARNT,
    OTHER_SPLIT,
    USED,
    EncodedRows,
    Encoder,
    EncodeSettings,
    row_error,
    template_for,
)
from megatune.data.formats import RowError, detect
from megatune.data.packing import best_fit, sequence_index
from megatune.data.sources import RawRow, parse_json_row, read_rows
from megatune.data.tokenizer import Tokenizer
from megatune.data.worker import Pool
from megatune.errors import DataError

OnProgress = Callable[[int, int], None]
_CHUNK_ROWS = 256
_CHUNK_BYTES = 2**20
_ROWS_ALONE = 20_000  # so many rows are tokenised here before processes are started for the rest
_MAX_PROCESSES = 32


def prepare(
    config: Config,
    tokenizer: Tokenizer,
    folder: str | Path | None = None,
    *,
    on_progress: OnProgress | None = None,
    processes: int | None = None,
) -> None:
    """Make the cache entries of a configuration's splits where they are missing or damaged.

    To be called by one process; the others wait, then `open_cache` or `build`. `folder`: the run's folder (default:
    checkpoint.folder). `on_progress(done, total)`: bytes of the data files. `processes`: tokenising processes for
    large sets (default: all cores). Raises DataError with file and line for a row that cannot be used (unless
    data.on_error is skip), for empty sets and for a full disk.
    """
    for split in splits(config.data):
        wanted = plan(config, tokenizer, split, folder, trust=False)
        if open_entry(wanted) is None:
            _build(config, tokenizer, wanted, on_progress, processes)


def _build(
    config: Config, tokenizer: Tokenizer, wanted: Plan, on_progress: OnProgress | None, processes: int | None
) -> None:
    data = config.data
    formats = [
        detect_format(path, number, data.format, data.on_error) for number, path in enumerate(wanted.files)
    ]
    settings = EncodeSettings.from_config(data, wanted.split, formats, template_for(data, formats, tokenizer))
    encoder = Encoder(settings, tokenizer)
    try:
        wanted.root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(wanted.root)
        temporary = wanted.root / f"tmp-{wanted.entry.name}-{socket.gethostname()}-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            writer = _Writer(temporary, tokenizer.vocab_size)
            _fill(writer, config, wanted, encoder, on_progress, processes)
            writer.finish(config, wanted, settings)
            _move(temporary, wanted)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"the token cache {wanted.root} cannot be written ({error.strerror or error}); free space or set "
            "data.cache to another folder"
        ) from error


def detect_format(path: Path, number: int, format: str, on_error: str) -> str:
    """data.format, or what the first row of the file says that can be read."""
    if format != "auto":
        return format
    for row in read_rows(path, number):
        try:
            if isinstance(row.value, RowError):
                raise row.value
            value = parse_json_row(row.value) if isinstance(row.value, bytes) else row.value
            if not isinstance(value, dict):
                raise RowError("type", "a row must be a JSON object")
            return detect(value)
        except RowError as error:
            if on_error == "error" or error.kind == "format":
                raise row_error(str(path), row, str(error)) from error
    raise DataError(f"{path} holds no row that can be read; mend it or remove it from the list")


def _fill(
    writer: _Writer,
    config: Config,
    wanted: Plan,
    encoder: Encoder,
    on_progress: OnProgress | None,
    processes: int | None,
) -> None:
    """Tokens of all rows into the writer. The first rows are tokenised here; where there are more, by processes."""
    sizes = [path.stat().st_size for path in wanted.files]
    limit = config.data.max_samples if wanted.split == "train" else None
    processes = min(len(os.sched_getaffinity(0)), _MAX_PROCESSES) if processes is None else processes
    rows = (row for number, path in enumerate(wanted.files) for row in read_rows(path, number))

    def take(encoded: Iterable[tuple[list[RawRow], EncodedRows]]) -> bool:
        """True where max_samples is reached."""
        for chunk, result in encoded:
            if writer.add(chunk, result, wanted, config.data.on_error, limit):
                return True
            if on_progress:
                last = chunk[-1]
                on_progress(sum(sizes[: last.file]) + min(last.position, sizes[last.file]), sum(sizes))
        return False

    chunks = _chunks(rows)
    alone = _ROWS_ALONE if processes > 1 else None
    if take((chunk, encoder.encode(chunk)) for chunk in _first_rows(chunks, alone)):
        return
    following = next(chunks, None)
    if following is not None:
        with Pool(encoder.settings, encoder.tokenizer, processes) as pool:
            take(pool.encode(_chain(following, chunks)))


def _chunks(rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    chunk: list[RawRow] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += len(row.value) if isinstance(row.value, bytes) else 0
        if len(chunk) >= _CHUNK_ROWS or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _first_rows(chunks: Iterator[list[RawRow]], limit: int | None) -> Iterator[list[RawRow]]:
    taken = 0
    while limit is None or taken < limit:
        chunk = next(chunks, None)
        if chunk is None:
            return
        taken += len(chunk)
        yield chunk


def _chain(first: list[RawRow], rest: Iterator[list[RawRow]]) -> Iterator[list[RawRow]]:
    yield first
    yield from rest


class _Writer:
    """Arrays of one entry, appended to files as the rows come."""

    def __init__(self, folder: Path, vocab_size: int):
        self.folder = folder
        self.dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self.counts: Counter[str] = Counter()
        self.lengths, self.targets, self.rows = array("q"), array("q"), array("q")
        self.bits_left = np.zeros(0, dtype=bool)  # fewer than 8, for the next byte
        self.tokens_file = open(folder / "tokens.bin", "wb")  # noqa: SIM115 - closed by finish
        self.mask_file = open(folder / "mask.bin", "wb")  # noqa: SIM115 - closed by finish
        self.began = time.perf_counter()

    def add(
        self, rows: list[RawRow], encoded: EncodedRows, wanted: Plan, on_error: str, limit: int | None
    ) -> bool:
        """Append a chunk; True where `limit` samples are there. DataError for a bad row unless they are skipped."""
        room = None if limit is None else limit - len(self.lengths)
        at, full = 0, False
        for number, (row, fate, length) in enumerate(zip(rows, encoded.fates, encoded.lengths, strict=True)):
            if number in encoded.errors and on_error == "error":
                raise row_error(str(wanted.files[row.file]), row, encoded.errors[number])
            if fate != OTHER_SPLIT:
                self.counts[fate] += 1
            if fate in USED:
                self.lengths.append(length)
                self.targets.append(int(np.count_nonzero(encoded.mask[at : at + length])))
                self.rows.extend((row.file, row.line))
                at += length
                if room is not None:
                    room -= 1
                    full = room == 0
            if full:
                break
        encoded.tokens[:at].astype(self.dtype).tofile(self.tokens_file)
        bits = np.concatenate([self.bits_left, encoded.mask[:at]])
        whole = len(bits) // 8 * 8
        np.packbits(bits[:whole], bitorder="little").tofile(self.mask_file)
        self.bits_left = bits[whole:]
        return full

    def finish(self, config: Config, wanted: Plan, settings: EncodeSettings) -> None:
        """Pack, write the remaining arrays, the index last. DataError where there are no samples."""
        np.packbits(self.bits_left, bitorder="little").tofile(self.mask_file)
        self.tokens_file.close()
        self.mask_file.close()
        if not self.lengths:
            raise _empty(config, wanted, self.counts)
        lengths = np.frombuffer(self.lengths, dtype=np.int64)
        targets = np.frombuffer(self.targets, dtype=np.int64)
        packing = config.data.packing
        bins = best_fit(lengths, config.data.seq_length) if packing else np.arange(len(lengths))
        count = int(bins.max()) + 1
        starts, samples, tokens, learnt = sequence_index(bins, lengths, targets, count)
        arrays = {
            "sample_starts": np.concatenate([[0], np.cumsum(lengths)]),
            "sample_rows": np.frombuffer(self.rows, dtype=np.int64),
            "sequence_starts": starts,
            "sequence_samples": samples,
            "sequence_tokens": tokens,
            "sequence_targets": learnt,
        }
        for name, values in arrays.items():
            values.astype("<i8").tofile(self.folder / f"{name}.bin")
        index = {
            "key": wanted.key,
            "split": wanted.split,
            "files": [str(path) for path in wanted.files],
            "settings": settings.as_dict(),
            "seq_length": config.data.seq_length,
            "samples": len(lengths),
            "sequences": count,
            "tokens": int(lengths.sum()),
            "targets": int(targets.sum()),
            "counts": dict(self.counts),
            "token_dtype": self.dtype.str,
            "bytes": {path.stem: path.stat().st_size for path in sorted(self.folder.glob("*.bin"))},
            "seconds": round(time.perf_counter() - self.began, 3),
        }
        (self.folder / INDEX).write_text(json.dumps(index, indent=1))


def _empty(config: Config, wanted: Plan, counts: Counter[str]) -> DataError:
    files = ", ".join(str(path) for path in wanted.files[:3])
    if wanted.split == "eval" and not config.data.eval:
        return DataError(
            f"data.eval_fraction: {config.data.eval_fraction} of the rows of {files} holds out none; raise it or "
            "give data.eval"
        )
    reasons = ", ".join(f"{count} {fate.replace('_', ' ')}" for fate, count in sorted(counts.items()))
    advice = "raise data.seq_length" if counts[NOTHING_LEARNT] else "look at them with data.on_error: error"
    detail = f"none of the rows of {files} can be used ({reasons}); {advice}"
    return DataError(f"data.{wanted.split}: {detail if counts else f'{files} holds no rows'}")


def _move(temporary: Path, wanted: Plan) -> None:
    """The finished entry to its place; another process may have been faster, a damaged one may be in the way."""
    for path in temporary.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if wanted.entry.exists():
        if open_entry(wanted) is not None:
            return
        shutil.rmtree(wanted.entry)
    try:
        temporary.rename(wanted.entry)
    except OSError:
        if open_entry(wanted) is None:
            raise


def _remove_leftovers(root: Path) -> None:
    """Unfinished entries of processes of this machine that are gone."""
    for path in root.glob(f"tmp-*-{socket.gethostname()}-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)
