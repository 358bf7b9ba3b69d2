"""Tokenising processes: `python -m megatune.data.worker`, fed through its standard input.

They are started as programs of their own, not forked: the parent has threads and perhaps a GPU, and its main module
may be a user's script. A frame is three little-endian int64 (bytes of header, of blob, of second blob), a JSON
header and the blobs. They live as long as their standard input; signals meant for the run do not end them.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import numpy as np

from megatune.data.encode import EncodedRows, Encoder, EncodeSettings
from megatune.data.formats import RowError
from megatune.data.sources import RawRow
from megatune.data.tokenizer import Tokenizer, load_tokenizer
from megatune.errors import DataError

_SIZES = struct.Struct("<qqq")


class Pool:
    """`processes` tokenising processes. Use as a context manager; `encode` keeps the order of its chunks."""

    def __init__(self, settings: EncodeSettings, tokenizer: Tokenizer, processes: int):
        hello = {"settings": settings.as_dict(), "tokenizer": str(tokenizer.folder)}
        self._size = processes
        self._free: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        try:
            self._all = [_start(hello) for _ in range(processes)]
        except OSError as error:
            raise DataError(f"tokenising processes cannot be started: {error.strerror or error}") from error
        for process in self._all:
            self._free.put(process)
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="tokenise")

    def encode(self, chunks: Iterable[list[RawRow]]) -> Iterator[tuple[list[RawRow], EncodedRows]]:
        """Each chunk with its tokens, in the given order; at most two chunks a process are in memory."""
        waiting: deque[tuple[list[RawRow], Future[EncodedRows]]] = deque()
        for chunk in chunks:
            waiting.append((chunk, self._threads.submit(self._one, chunk)))
            if len(waiting) >= 2 * self._size:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._all:
            process.kill()
            process.wait()
            with suppress(BrokenPipeError):  # what it was not told any more
                process.stdin.close()
            process.stdout.close()
        self._threads.shutdown(wait=True)

    def _one(self, rows: list[RawRow]) -> EncodedRows:
        process = self._free.get()
        try:
            header, blob = _pack_rows(rows)
            _write(process.stdin, header, blob)
            answer, tokens, mask = _read(process.stdout)
        except (OSError, EOFError) as error:
            code = process.wait()
            raise DataError(
                f"a tokenising process ended with exit code {code}; its last words are above (-9: the machine ran out "
                "of memory)"
            ) from error
        finally:
            self._free.put(process)
        return EncodedRows(
            answer["fates"],
            {int(number): message for number, message in answer["errors"].items()},
            answer["lengths"],
            np.frombuffer(tokens, dtype="<u4"),
            np.frombuffer(mask, dtype=bool),
        )


def _start(hello: dict[str, Any]) -> subprocess.Popen[bytes]:
    package_root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([package_root, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", "megatune.data.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
    )
    _write(process.stdin, hello, b"")
    return process


def _pack_rows(rows: list[RawRow]) -> tuple[dict[str, Any], bytes]:
    entries, texts = [], []
    for row in rows:
        if isinstance(row.value, RowError):
            entries.append([row.file, row.line, -1, row.value.kind, str(row.value)])
            continue
        # Values that JSON does not know (dates in Parquet) stand in columns that no format reads as text.
        text = row.value if isinstance(row.value, bytes) else json.dumps(row.value, default=str).encode()
        entries.append([row.file, row.line, len(text)])
        texts.append(text)
    return {"rows": entries}, b"".join(texts)


def _unpack_rows(header: dict[str, Any], blob: bytes) -> list[RawRow]:
    rows, at = [], 0
    for file, line, size, *error in header["rows"]:
        if size < 0:
            rows.append(RawRow(file, line, RowError(*error), 0))
        else:
            rows.append(RawRow(file, line, blob[at : at + size], 0))
            at += size
    return rows


def _write(stream: IO[bytes], header: dict[str, Any], *blobs: bytes) -> None:
    text = json.dumps(header).encode()
    first, second = (*blobs, b"", b"")[:2]
    stream.write(_SIZES.pack(len(text), len(first), len(second)))
    for part in (text, first, second):
        stream.write(part)
    stream.flush()


def _read(stream: IO[bytes]) -> tuple[dict[str, Any], bytes, bytes]:
    sizes = stream.read(_SIZES.size)
    if len(sizes) < _SIZES.size:
        raise EOFError
    text, first, second = (stream.read(size) for size in _SIZES.unpack(sizes))
    return json.loads(text), first, second


def main() -> None:
    """Serve one parent until it closes the pipe."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    try:
        hello, _, _ = _read(requests)
        encoder = Encoder(EncodeSettings(**hello["settings"]), load_tokenizer(hello["tokenizer"]))
        while True:
            header, blob, _ = _read(requests)
            done = encoder.encode(_unpack_rows(header, blob))
            answer = {"fates": done.fates, "errors": done.errors, "lengths": done.lengths}
            _write(answers, answer, done.tokens.astype("<u4").tobytes(), done.mask.tobytes())
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the parent is gone or done; nothing is left to flush to


if __name__ == "__main__":
    main()
