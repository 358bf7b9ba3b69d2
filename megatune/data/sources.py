"""Data files to raw rows, streamed: JSON lines, JSON arrays, Parquet and CSV.

Every row knows its file and line. What is wrong with a file as a whole raises DataError; what is wrong with one row
is handed on as a RowError in its place, so that `data.on_error` can decide.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatune.data.formats import COLUMNS, RowError
from megatune.errors import ConfigError, DataError

MAX_ROW_BYTES = 64 * 2**20
_CHUNK = 2**20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class RawRow:
    """`file`: number of the file; `line`: 1-based line (row number in Parquet); `value`: JSON text, the parsed row,
    or why it cannot be read; `position`: bytes of the file consumed so far, for progress."""

    file: int
    line: int
    value: bytes | dict[str, Any] | RowError
    position: int


def list_files(names: list[str], key: str) -> list[Path]:
    """The data files behind `names` (files, or folders: all data files directly in them, sorted).

    Raises DataError for a missing or empty file, an unknown ending, a folder without data files.
    """
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in READERS and p.is_file())
            if not inside:
                raise DataError(f"data.{key}: folder {path} holds no data files ({', '.join(READERS)})")
            files += inside
        elif not path.exists():
            raise DataError(f"data.{key}: {path} does not exist (looked from {Path.cwd()})")
        elif path.suffix.lower() not in READERS:
            raise DataError(f"data.{key}: {path} has no known ending; use one of {', '.join(READERS)}")
        else:
            files.append(path)
    for path in files:
        if path.stat().st_size == 0:
            raise DataError(f"data.{key}: {path} is empty; remove it from the list or restore it")
    if not files:
        raise DataError(f"data.{key} names no file")
    return files


def read_rows(path: Path, number: int) -> Iterator[RawRow]:
    """All rows of one file, in order. DataError where the file as a whole cannot be read."""
    try:
        yield from READERS[path.suffix.lower()](path, number)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def where(path: Path | str, line: int) -> str:
    """How an error names a row."""
    return f"{path}, row {line}" if str(path).lower().endswith(".parquet") else f"{path}:{line}"


def parse_json_row(data: bytes) -> Any:
    """One row's JSON text. RowError for bytes that are no UTF-8 or no JSON."""
    if b"\0" in data:
        raise RowError("encoding", "a NUL byte: the file is damaged or no text")
    try:
        return json.loads(data.rstrip().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError("encoding", f"not UTF-8 (byte {error.start} of the line)") from error
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" at").removesuffix(" starting")
        raise RowError("json", f"not valid JSON ({reason}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting without end
        raise RowError("json", f"not usable JSON ({str(error)[:80]})") from error


def _read_lines(path: Path, number: int) -> Iterator[RawRow]:
    with open(path, "rb") as file:
        line, position = 0, 0
        while data := file.readline(MAX_ROW_BYTES):
            line += 1
            position += len(data)
            if line == 1:
                data = data.removeprefix(_BOM)
            if len(data) >= MAX_ROW_BYTES and not data.endswith(b"\n"):
                position += _skip_line(file)
                error = RowError("too_big", f"the line is longer than {MAX_ROW_BYTES >> 20} MiB")
                yield RawRow(number, line, error, position)
            elif data.strip():
                yield RawRow(number, line, data, position)


def _skip_line(file: Any) -> int:
    skipped = 0
    while data := file.readline(_CHUNK):
        skipped += len(data)
        if data.endswith(b"\n"):
            break
    return skipped


def _read_json(path: Path, number: int) -> Iterator[RawRow]:
    """A JSON array of rows, or JSON lines under another name."""
    with open(path, "rb") as file:
        head = file.read(_CHUNK).removeprefix(_BOM).lstrip()
    if head.startswith(b"["):
        yield from _Array(path, number).rows()
    else:
        yield from _read_lines(path, number)


class _Array:
    """Elements of one JSON array, decoded one by one, so that the file need not fit into memory."""

    def __init__(self, path: Path, number: int):
        self.path, self.number = path, number
        self.text, self.at = "", 0
        self.line, self.counted = 1, 0
        self.read = 0
        self.decoder = json.JSONDecoder()

    def rows(self) -> Iterator[RawRow]:
        with open(self.path, encoding="utf-8-sig", newline="") as self.file:
            self._peek()
            self.at += 1  # the bracket
            if self._peek() == "]":
                return
            while True:
                value, line = self._element()
                yield RawRow(self.number, line, value, self.read)
                after = self._peek()
                if after == "]":
                    return
                if after != ",":
                    raise self._broken(
                        "a comma or ] is missing" if after else "the file ends inside the array"
                    )
                self.at += 1

    def _element(self) -> tuple[dict[str, Any] | RowError, int]:
        if not self._peek():
            raise self._broken("the file ends inside the array")
        line = self._line()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", str(error)[:80])
                bad_line = line + self.text.count("\n", self.at, getattr(error, "pos", self.at))
                # Cut off by the end of the buffer, or wrong: only more text can tell.
                if len(self.text) - self.at > MAX_ROW_BYTES or not self._more():
                    raise self._broken(f"not valid JSON ({reason})", bad_line) from error
                continue
            self.at = end
            if isinstance(value, dict):
                return value, line
            return RowError("type", "a row must be a JSON object"), line

    def _peek(self) -> str:
        """Next character that is no white space; "" at the end."""
        while True:
            while self.at < len(self.text):
                if not self.text[self.at].isspace():
                    return self.text[self.at]
                self.at += 1
            if not self._more():
                return ""

    def _more(self) -> bool:
        try:
            # As much again as is waiting: a row that is decoded anew each time costs twice its length, not its square.
            text = self.file.read(max(_CHUNK, len(self.text) - self.at))
        except UnicodeDecodeError as error:
            raise self._broken("not UTF-8") from error
        self._line()
        self.text = self.text[self.at :] + text
        self.at = self.counted = 0
        self.read += len(text)
        return bool(text)

    def _line(self) -> int:
        self.line += self.text.count("\n", self.counted, self.at)
        self.counted = self.at
        return self.line

    def _broken(self, reason: str, line: int | None = None) -> DataError:
        return DataError(
            f"{self.path}:{line or self._line()}: {reason}; mend the file (in an array nothing after this can be "
            "read; one row a line, as .jsonl, could be skipped)"
        )


def _read_csv(path: Path, number: int) -> Iterator[RawRow]:
    csv.field_size_limit(MAX_ROW_BYTES)
    # Bytes that are no UTF-8 become surrogates, which are looked for below: one bad row must not hide the others.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise DataError(f"{path}:1: not valid CSV ({error}); write the file again") from error
        if len(set(header)) != len(header) or not all(header) or not set(header) & set(COLUMNS):
            raise DataError(
                f"{path}:1: the first line must name the columns (for example prompt,completion), this is "
                f"{','.join(header)[:80]!r}"
            )
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield RawRow(number, line, RowError("csv", f"not valid CSV ({error})"), 0)
                continue
            if cells:
                yield RawRow(number, line, _csv_row(header, cells), file.buffer.tell())


def _csv_row(header: list[str], cells: list[str]) -> dict[str, Any] | RowError:
    if len(cells) != len(header):
        return RowError("csv", f"{len(cells)} cells where the first line names {len(header)} columns")
    for name, cell in zip(header, cells, strict=True):
        if "\0" in cell:
            return RowError("encoding", f"a NUL byte in column {name}: the file is damaged or no text")
        if not cell.isascii() and any("\ud800" <= character <= "\udfff" for character in cell):
            return RowError("encoding", f"column {name} is not UTF-8")
    return dict(zip(header, cells, strict=True))


def _read_parquet(path: Path, number: int) -> Iterator[RawRow]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ConfigError(f"{path} needs the package pyarrow: pip install pyarrow") from error
    size = path.stat().st_size
    try:
        with parquet.ParquetFile(path) as table:
            names = [name for name in table.schema_arrow.names if name in COLUMNS]
            if not names:
                found = ", ".join(table.schema_arrow.names[:12])
                raise DataError(
                    f"{path} has none of the columns {', '.join(COLUMNS)} (it has {found}); rename them"
                )
            total, line = max(1, table.metadata.num_rows), 0
            for batch in table.iter_batches(batch_size=1024, columns=names):
                for row in batch.to_pylist():
                    line += 1
                    yield RawRow(number, line, row, size * line // total)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise DataError(f"{path} is no readable Parquet file ({reason}); write it again") from error


READERS: dict[str, Callable[[Path, int], Iterator[RawRow]]] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
