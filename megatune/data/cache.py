"""The token cache: a data set tokenised and packed once, memory-mapped ever after.

A cache folder holds entries, one for each data set, split and setting that ever was; an entry is a folder named by a
key over the content of the data files, the tokenizer, the chat template and the settings:

    train-0a1b2c3d4e5f6071/
      index.json         counts, settings, and size of each array; an entry whose arrays differ in size is no entry
      tokens.bin         uint16 or uint32 [tokens], all samples one after the other
      mask.bin           bits [tokens], 1 where a token is learnt
      sample_starts.bin  int64 [samples + 1], where each sample begins in tokens
      sample_rows.bin    int64 [samples, 2], file and line that each sample came from
      sequence_starts.bin, sequence_samples.bin   int64: the samples of each packed sequence
      sequence_tokens.bin, sequence_targets.bin   int64 [sequences]: tokens, and learnt tokens

`files.json` beside the entries remembers digests of data files by size and time, so that a warm start reads none.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatune.config.schema import Config, DataConfig
from megatune.data.encode import OTHER_SPLIT, TOO_LONG, TRUNCATED, USED
from megatune.data.sources import list_files, where
from megatune.data.template import read_template
from megatune.data.tokenizer import Tokenizer
from megatune.errors import DataError

VERSION = 1
INDEX = "index.json"
_DIGEST_LIMIT = 2**30  # larger files are known by size and time
_RACY_SECONDS = 2.0  # a file may change again within its time stamp's grain
ARRAYS = {
    "sample_starts": "<i8",
    "sample_rows": "<i8",
    "sequence_starts": "<i8",
    "sequence_samples": "<i8",
    "sequence_tokens": "<i8",
    "sequence_targets": "<i8",
}


class TokenCache:
    """An open entry. `tokens`: memory map of all samples' tokens; `sequence_tokens`, `sequence_targets`: int64
    [sequences]. `counts`: what became of the rows (data/encode.py). `key`: name of its content."""

    def __init__(self, entry: Path, index: dict[str, Any], files: list[Path]):
        self.entry, self.index, self.files = entry, index, files
        self.key: str = index["key"]
        self.counts: dict[str, int] = index["counts"]
        self.tokens = self._map("tokens", index["token_dtype"])
        self._mask = self._map("mask", "u1")
        arrays = {name: self._map(name, dtype) for name, dtype in ARRAYS.items()}
        self.sequence_tokens = arrays["sequence_tokens"]
        self.sequence_targets = arrays["sequence_targets"]
        self._sample_starts = arrays["sample_starts"]
        self._sample_rows = arrays["sample_rows"].reshape(-1, 2)
        self._sequence_starts = arrays["sequence_starts"]
        self._sequence_samples = arrays["sequence_samples"]

    @property
    def num_samples(self) -> int:
        return len(self._sample_starts) - 1

    @property
    def num_sequences(self) -> int:
        return len(self.sequence_tokens)

    def sample(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, mask) of one sample: uint16 or uint32 [tokens] in the map, bool [tokens]."""
        start, end = (int(at) for at in self._sample_starts[number : number + 2])
        bits = np.unpackbits(self._mask[start // 8 : -(-end // 8)], bitorder="little")
        return self.tokens[start:end], bits[start % 8 : start % 8 + end - start].astype(bool)

    def samples_of(self, sequence: int) -> list[int]:
        """Numbers of the samples that make up one packed sequence, in order."""
        start, end = self._sequence_starts[sequence : sequence + 2]
        return self._sequence_samples[start:end].tolist()

    def source(self, sample: int) -> str:
        """File and line that a sample came from."""
        file, line = self._sample_rows[sample].tolist()
        return where(self.files[file], line)

    def largest_token(self) -> int:
        """The highest token number in the cache; reads all of it (about 2 GB/s)."""
        return int(self.tokens.max())

    def describe(self) -> str:
        """One line for people: sizes, how full the sequences are, what was cut or left out."""
        index = self.index
        tokens = index["tokens"]
        full = tokens / (index["sequences"] * index["seq_length"])
        parts = [
            f"{index['samples']:,} samples, {tokens:,} tokens ({index['targets'] / tokens:.0%} with loss) in "
            f"{index['sequences']:,} sequences ({full:.1%} full)"
        ]
        for fate, count in sorted(self.counts.items()):
            if fate == TRUNCATED:
                parts.append(f"{count:,} truncated")
            elif fate == TOO_LONG:
                parts.append(f"{count:,} too long, dropped")
            elif fate not in (*USED, OTHER_SPLIT):
                parts.append(f"{count:,} left out ({fate.replace('_', ' ')})")
        return "; ".join(parts)

    def _map(self, name: str, dtype: str) -> np.ndarray:
        return np.memmap(self.entry / f"{name}.bin", dtype=dtype, mode="r")


@dataclass(frozen=True)
class Plan:
    """Where a split comes from, and where its entry is or will be. `key`: see above."""

    split: str
    files: list[Path]
    root: Path
    key: str

    @property
    def entry(self) -> Path:
        return self.root / f"{self.split}-{self.key[:16]}"


def cache_root(config: Config, folder: str | Path | None = None) -> Path:
    """data.cache, else `cache` in the run's folder."""
    return (
        Path(config.data.cache) if config.data.cache else Path(folder or config.checkpoint.folder) / "cache"
    )


def splits(data: DataConfig) -> list[str]:
    """The splits that a configuration has: train, and eval where there are held-out files or a share of rows."""
    return ["train", "eval"] if data.eval or data.eval_fraction else ["train"]


def plan(config: Config, tokenizer: Tokenizer, split: str, folder: str | Path | None, *, trust: bool) -> Plan:
    """What a split is made of. `trust`: believe remembered digests of files even where a file is so new that it may
    have changed within its time stamp. DataError for missing or empty files."""
    data = config.data
    held_out_files = [data.eval] if isinstance(data.eval, str) else data.eval or []
    own_files = split == "eval" and bool(held_out_files)
    files = list_files(held_out_files if own_files else data.train, "eval" if own_files else "train")
    root = cache_root(config, folder)
    identity = {
        "version": VERSION,
        "split": split,
        "files": _digests(files, root, trust),
        "tokenizer": tokenizer.digest,
        "special": tokenizer.special_tokens,
        "template": read_template(data.chat_template) if data.chat_template else tokenizer.chat_template,
        "format": data.format,
        "seq_length": data.seq_length,
        "packing": data.packing,
        "train_on": data.train_on,
        "system": data.system,
        "too_long": data.too_long,
        "on_error": data.on_error,
        "held_out": 0.0 if data.eval else data.eval_fraction,
        "max_samples": data.max_samples if split == "train" else None,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Plan(split, files, root, key)


def open_cache(
    config: Config, tokenizer: Tokenizer, split: str, folder: str | Path | None = None
) -> TokenCache | None:
    """The entry of a split, None where it was not made yet (`prepare` makes it) or is damaged."""
    return open_entry(plan(config, tokenizer, split, folder, trust=True))


def open_entry(wanted: Plan) -> TokenCache | None:
    """The entry of a plan, None where there is none or its files are not as its index says."""
    try:
        index = json.loads((wanted.entry / INDEX).read_text())
        sizes = {name: (wanted.entry / f"{name}.bin").stat().st_size for name in index["bytes"]}
        if index["key"] != wanted.key or sizes != index["bytes"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):  # nothing there, or an index cut in its middle
        return None
    return TokenCache(wanted.entry, index, wanted.files)


def _digests(files: list[Path], root: Path, trust: bool) -> list[str]:
    memory_path = root / "files.json"
    try:
        memory = json.loads(memory_path.read_text())
    except (OSError, ValueError):  # not there yet, or another process is just writing it: only a memory
        memory = {}
    found, changed = [], False
    for path in files:
        name, stat = str(path.resolve()), path.stat()
        facts = [stat.st_size, stat.st_mtime_ns]
        known = memory.get(name)
        if stat.st_size > _DIGEST_LIMIT:
            digest = f"{stat.st_size} {stat.st_mtime_ns}"
        elif known and known["facts"] == facts and (trust or not known["racy"]):
            digest = known["digest"]
        else:
            digest = _digest(path)
            racy = time.time() - stat.st_mtime < _RACY_SECONDS
            memory[name] = {"facts": facts, "racy": racy, "digest": digest}
            changed = True
        found.append(digest)
    if changed:
        try:
            root.mkdir(parents=True, exist_ok=True)
            temporary = root / f"files.json.{socket.gethostname()}.{os.getpid()}"
            temporary.write_text(json.dumps(memory))
            temporary.replace(memory_path)
        except OSError as error:
            raise DataError(
                f"the token cache {root} cannot be written ({error.strerror}); set data.cache to another folder"
            ) from error
    return found


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
