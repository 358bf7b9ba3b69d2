"""Which sequences an optimizer step sees, and which of them this process.

The order depends on the seed and the step alone. The sequences of all epochs form one endless stream; step s takes
its positions [s * G, (s + 1) * G), position p is sequence permutation(seed, p // N)[p % N] of N. A global batch of G
sequences is cut into micro-batches, which go to the processes in turn: micro-batch i to process i mod dp_size. So any
number of processes sees the same micro-batches, and resuming needs nothing but the step.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from megatune.config.schema import Config
from megatune.data.batch import Batch, empty_batch, make_batch
from megatune.data.cache import TokenCache, cache_root, open_cache, splits
from megatune.data.cache_builder import prepare
from megatune.data.tokenizer import Tokenizer
from megatune.errors import DataError, ParallelError


class TrainLoader:
    """Micro-batches of the training set for one of `dp_size` data-parallel processes.

    ParallelError where `global_batch_size` does not split, DataError for fewer sequences than processes.
    """

    def __init__(
        self,
        cache: TokenCache,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
    ):
        _check_split(cache, global_batch_size, micro_batch_size, dp_size)
        self.cache, self.seed = cache, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        # Two, because a global batch may lie across the end of an epoch.
        self._permutation = lru_cache(maxsize=2)(lambda epoch: permutation(seed, epoch, self.num_sequences))
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[list[Batch]]] | None = None

    @property
    def num_sequences(self) -> int:
        """Packed sequences in one epoch."""
        return self.cache.num_sequences

    def steps_per_epoch(self, global_batch_size: int | None = None) -> float:
        """Optimizer steps in one pass over the training set; need not be whole."""
        return self.num_sequences / (global_batch_size or self.global_batch_size)

    def sequences(self, step: int) -> np.ndarray:
        """Numbers of the packed sequences of step's global batch, in order: int64 [global_batch_size]."""
        positions = np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        epochs, places = np.divmod(positions, self.num_sequences)
        found = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = self._permutation(int(epoch))[places[here]]
        return found

    def step(self, step: int) -> list[Batch]:
        """This process's micro-batches of optimizer step `step` (0-based). Those of the step after are made
        meanwhile."""
        if self._next is not None and self._next[0] == step:
            batches = self._next[1].result()
        else:
            batches = self._make(step)
        self._next = (step + 1, self._ahead.submit(self._make, step + 1))
        return batches

    def target_tokens(self, step: int) -> int:
        """Scored tokens of the whole global batch."""
        return int(self.cache.sequence_targets[self.sequences(step)].sum())

    def tokens(self, step: int) -> int:
        """All tokens of the whole global batch."""
        return int(self.cache.sequence_tokens[self.sequences(step)].sum())

    def _make(self, step: int) -> list[Batch]:
        groups = self.sequences(step).reshape(-1, self.micro_batch_size)
        mine = range(self.dp_rank, len(groups), self.dp_size)
        return [make_batch(self.cache, groups[index].tolist(), index) for index in mine]


class EvalLoader:
    """All held-out sequences in order, dealt to the processes in micro-batches. `target_tokens`: scored tokens of
    the whole set, over all processes."""

    def __init__(
        self, cache: TokenCache, *, micro_batch_size: int, dp_rank: int = 0, dp_size: int = 1, filler: int = 0
    ):
        self.cache, self.micro_batch_size = cache, micro_batch_size
        self.dp_rank, self.dp_size, self._filler = dp_rank, dp_size, filler
        self.target_tokens = int(cache.sequence_targets.sum())

    @property
    def num_sequences(self) -> int:
        return self.cache.num_sequences

    def batches(self) -> Sequence[Batch]:
        """This process's micro-batches, made as they are asked for; every process has the same number of them (where
        one runs out, batches with nothing scored)."""
        return _EvalBatches(self)

    def _number(self) -> int:
        return -(-self.num_sequences // (self.micro_batch_size * self.dp_size))

    def _batch(self, number: int) -> Batch:
        index = number * self.dp_size + self.dp_rank
        first = index * self.micro_batch_size
        sequences = range(first, min(first + self.micro_batch_size, self.num_sequences))
        return make_batch(self.cache, sequences, index) if sequences else empty_batch(self._filler, index)


class _EvalBatches(Sequence[Batch]):
    def __init__(self, loader: EvalLoader):
        self._loader = loader

    def __len__(self) -> int:
        return self._loader._number()

    def __getitem__(self, number: int) -> Batch:  # type: ignore[override] - no slices
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._loader._batch(number)


@dataclass(frozen=True)
class DataModule:
    """The data of a run. `digest`: names the training set, its tokens and its packing: two runs with the same digest
    and seed see the same micro-batches."""

    train: TrainLoader
    eval: EvalLoader | None

    @property
    def digest(self) -> str:
        return self.train.cache.key

    @property
    def report(self) -> dict[str, dict[str, int]]:
        """Split -> what became of its rows (kept, truncated, too_long, and kinds of errors where skipped)."""
        found = {"train": self.train.cache.counts}
        return found | ({"eval": self.eval.cache.counts} if self.eval else {})

    def describe(self) -> str:
        """For people: one line, or one for each split."""
        text = self.train.cache.describe()
        return text if self.eval is None else f"{text}\nheld out: {self.eval.cache.describe()}"


def build(
    config: Config,
    tokenizer: Tokenizer,
    *,
    dp_rank: int = 0,
    dp_size: int = 1,
    folder: str | Path | None = None,
    wait: float = 60.0,
) -> DataModule:
    """Loaders over the token cache that `prepare` made.

    `folder`: the run's folder (default: checkpoint.folder). A cache that is not there is made by dp_rank 0; the others
    wait for it up to `wait` seconds (a network file system may show it late), then raise DataError. Raises as
    `prepare` and TrainLoader.
    """
    caches = {}
    for split in splits(config.data):
        cache = open_cache(config, tokenizer, split, folder)
        if cache is None and dp_rank == 0:
            prepare(config, tokenizer, folder)
            cache = open_cache(config, tokenizer, split, folder)
        deadline = time.monotonic() + wait
        while cache is None and dp_rank > 0 and time.monotonic() < deadline:
            time.sleep(min(1.0, wait / 10))
            cache = open_cache(config, tokenizer, split, folder)
        if cache is None:
            root = cache_root(config, folder)
            raise DataError(
                f"data.{split}: process {dp_rank} finds no token cache in {root}; data.cache must be a folder that all "
                "machines share, data files must not change at the start, and `prepare` runs in one process first"
            )
        caches[split] = cache
    train = config.train
    loader = TrainLoader(
        caches["train"],
        seed=train.seed,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )
    held_out = None
    if "eval" in caches:
        held_out = EvalLoader(
            caches["eval"], micro_batch_size=train.micro_batch_size, dp_rank=dp_rank, dp_size=dp_size
        )
    return DataModule(loader, held_out)


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Order of `count` sequences in an epoch: int64 [count].

    Sorts raw output of Philox (Salmon et al. 2011), whose stream numpy guarantees, unlike that of its shuffles: a run
    may be resumed with another numpy.
    """
    key = hashlib.sha256(f"megatune/order/{seed}/{epoch}".encode()).digest()[:16]
    generator = np.random.Philox(key=int.from_bytes(key, "little"))
    return np.argsort(generator.random_raw(count), kind="stable")


def _check_split(cache: TokenCache, global_batch_size: int, micro_batch_size: int, dp_size: int) -> None:
    share = dp_size * micro_batch_size
    if global_batch_size % share:
        below = global_batch_size // share * share
        legal = " or ".join(str(number) for number in (below, below + share) if number)
        raise ParallelError(
            f"train.global_batch_size: {global_batch_size} sequences do not split into micro-batches of "
            f"{micro_batch_size} on {dp_size} data-parallel processes; use {legal}"
        )
    if cache.num_sequences < dp_size:
        raise DataError(
            f"data.train: {cache.num_sequences} packed sequences are fewer than the {dp_size} data-parallel "
            "processes; use fewer processes, more data, a smaller data.seq_length or data.packing: false"
        )
