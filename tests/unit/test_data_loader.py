"""Micro-batches: which sequences, in which order, on which process, with which targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatune.data import (
    Batch,
    DataModule,
    TokenCache,
    Tokenizer,
    TrainLoader,
    build,
    encode_chat,
    load_tokenizer,
)
from megatune.data.batch import make_batch
from megatune.data.loader import permutation
from megatune.errors import DataError, ParallelError
from tests.helpers.datasets import config, tokenizer_folder, write_lines
from tests.helpers.tiny import CHATML, tiny_rows

ROWS = 60


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tokenizer_folder(tmp_path_factory.mktemp("tokenizer"), CHATML))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_lines(folder / "train.jsonl", tiny_rows(ROWS))
    write_lines(folder / "eval.jsonl", tiny_rows(11, first=ROWS))
    return folder


def module(folder: Path, tokenizer: Tokenizer, rank: int = 0, size: int = 1, **more: Any) -> DataModule:
    train = {"global_batch_size": 8, "micro_batch_size": 1, "seed": 3}
    data: dict[str, Any] = {"eval": str(folder / "eval.jsonl"), "seq_length": 128}
    for key, value in more.items():
        (train if key in ("global_batch_size", "micro_batch_size", "seed") else data)[key] = value
    settings = config(folder, folder / "train.jsonl", train_section=train, **data)
    return build(settings, tokenizer, dp_rank=rank, dp_size=size)


def same(first: Batch, second: Batch) -> bool:
    pairs = [
        (first.tokens, second.tokens),
        (first.segments.cu_seqlens, second.segments.cu_seqlens),
        (first.targets.index, second.targets.index),
        (first.targets.labels, second.targets.labels),
    ]
    ids = (first.sequence_ids, first.sample_ids, first.index) == (
        second.sequence_ids,
        second.sample_ids,
        second.index,
    )
    return ids and all(torch.equal(a, b) for a, b in pairs)


def check_batch(batch: Batch, cache: TokenCache) -> None:
    """Everything that must hold for a batch, document by document."""
    samples = [sample for sequence in batch.sequence_ids for sample in cache.samples_of(sequence)]
    assert batch.sample_ids == tuple(samples)
    assert batch.segments.lengths == tuple(len(cache.sample(sample)[0]) for sample in samples)
    expected: list[tuple[int, int]] = []
    start = 0
    for sample in samples:
        tokens, mask = (values.tolist() for values in cache.sample(sample))
        end = start + len(tokens)
        assert batch.tokens[start:end].tolist() == tokens
        assert batch.segments.positions[start:end].tolist() == list(range(len(tokens)))
        # The output at a position is scored against the next token, and only inside the document.
        expected += [(start + at, tokens[at + 1]) for at in range(len(tokens) - 1) if mask[at + 1]]
        start = end
    assert start == len(batch.tokens)
    assert list(zip(batch.targets.index.tolist(), batch.targets.labels.tolist(), strict=True)) == expected
    assert batch.tokens.dtype == batch.targets.index.dtype == batch.targets.labels.dtype == torch.int64


def test_batches_are_documents_with_targets_inside(folder: Path, tokenizer: Tokenizer) -> None:
    data = module(folder, tokenizer, micro_batch_size=2)
    for batch in data.train.step(0) + data.train.step(1):
        assert len(batch.sequence_ids) == 2 and len(batch.sample_ids) > 2
        check_batch(batch, data.train.cache)


def test_sample_order_at_any_width_and_accumulation(folder: Path, tokenizer: Tokenizer) -> None:
    alone = module(folder, tokenizer).train
    for micro in (1, 2):
        reference = module(folder, tokenizer, micro_batch_size=micro).train
        for size in (1, 2, 4):
            ranks = [module(folder, tokenizer, r, size, micro_batch_size=micro).train for r in range(size)]
            for step in (0, 1, 7):
                together = [batch for loader in ranks for batch in loader.step(step)]
                together.sort(key=lambda batch: batch.index)
                assert all(same(a, b) for a, b in zip(together, reference.step(step), strict=True))
                ids = [number for batch in together for number in batch.sequence_ids]
                assert ids == alone.sequences(step).tolist()
                assert len({len(loader.step(step)) for loader in ranks}) == 1
                targets = sum(len(batch.targets.index) for batch in together)
                tokens = sum(len(batch.tokens) for batch in together)
                for loader in ranks:
                    assert (loader.target_tokens(step), loader.tokens(step)) == (targets, tokens)


def test_accumulation_changes_grouping_only(folder: Path, tokenizer: Tokenizer) -> None:
    one, four = (module(folder, tokenizer, micro_batch_size=micro).train for micro in (8, 2))
    (whole,), parts = one.step(2), four.step(2)
    assert len(parts) == 4
    assert torch.equal(whole.tokens, torch.cat([batch.tokens for batch in parts]))
    assert torch.equal(whole.targets.labels, torch.cat([batch.targets.labels for batch in parts]))


def test_an_epoch_sees_every_sequence_once(folder: Path, tokenizer: Tokenizer) -> None:
    loader = module(folder, tokenizer, global_batch_size=4).train
    count = loader.num_sequences
    assert count % 4  # so that a batch lies across the end of an epoch
    order = np.concatenate([loader.sequences(step) for step in range(count)])
    epochs = order.reshape(4, count)
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = module(folder, tokenizer, global_batch_size=4, seed=4).train
    assert not np.array_equal(
        order[:count], np.concatenate([other.sequences(s) for s in range(count)])[:count]
    )
    assert loader.steps_per_epoch() == count / 4


def test_a_batch_larger_than_the_set(folder: Path, tokenizer: Tokenizer) -> None:
    loader = module(folder, tokenizer, global_batch_size=50).train
    assert loader.num_sequences < 50
    assert np.bincount(loader.sequences(0)).min() >= 50 // loader.num_sequences


def test_resuming_at_any_step_is_exact_and_fast(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = module(folder, tokenizer).train
    steps = [running.step(step) for step in range(12)]
    for step in (11, 3, 0, 7):
        resumed = module(folder, tokenizer).train
        assert all(same(a, b) for a, b in zip(resumed.step(step), steps[step], strict=True))
        assert all(same(a, b) for a, b in zip(running.step(step), steps[step], strict=True))
    made = []
    monkeypatch.setattr("megatune.data.loader.permutation", lambda *of: made.append(of) or permutation(*of))
    module(folder, tokenizer).train.step(10**6)
    assert 0 < len(made) <= 4  # of the epochs of that step and of the next, not of a million


def test_the_order_is_written_in_stone() -> None:
    # A run must be resumable with every later version: these numbers may never change.
    assert permutation(0, 0, 8).tolist() == [3, 1, 0, 7, 5, 6, 4, 2]
    assert permutation(7, 3, 5).tolist() == [4, 3, 0, 1, 2]
    assert permutation(0, 1, 8).tolist() != permutation(1, 0, 8).tolist()
    assert np.array_equal(np.sort(permutation(5, 2, 300_000)), np.arange(300_000))


def test_packed_targets_are_the_unpacked_ones(folder: Path, tokenizer: Tokenizer) -> None:
    def by_sample(data: DataModule) -> dict[int, tuple[list[int], list[int], list[int]]]:
        found = {}
        for number in range(data.train.num_sequences):
            batch = make_batch(data.train.cache, [number])
            borders = batch.segments.cu_seqlens.tolist()
            for sample, start, end in zip(batch.sample_ids, borders, borders[1:], strict=False):
                inside = (batch.targets.index >= start) & (batch.targets.index < end)
                found[sample] = (
                    batch.tokens[start:end].tolist(),
                    (batch.targets.index[inside] - start).tolist(),
                    batch.targets.labels[inside].tolist(),
                )
        return found

    packed, single = module(folder, tokenizer), module(folder, tokenizer, packing=False)
    assert single.train.num_sequences == ROWS > packed.train.num_sequences
    assert by_sample(packed) == by_sample(single)
    ids, mask = encode_chat(tiny_rows(1)[0]["messages"], tokenizer)
    scored = [at for at, learnt in enumerate(mask) if learnt]
    assert by_sample(single)[0] == (ids, [at - 1 for at in scored], [ids[at] for at in scored])


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4, 16])
def test_evaluation_over_processes(folder: Path, tokenizer: Tokenizer, size: int, packing: bool) -> None:
    ranks = [
        module(folder, tokenizer, rank, size, global_batch_size=32, micro_batch_size=2, packing=packing, seq_length=96)
        for rank in range(size)
    ] if size < 16 else []  # fmt: skip
    if not ranks:  # more processes than training sequences: evaluation alone
        from megatune.data import EvalLoader

        cache = module(folder, tokenizer, packing=packing).eval.cache
        loaders = [EvalLoader(cache, micro_batch_size=2, dp_rank=rank, dp_size=size) for rank in range(size)]
    else:
        loaders = [data.eval for data in ranks]
    batches = [list(loader.batches()) for loader in loaders]
    assert len({len(found) for found in batches}) == 1
    seen = [number for found in batches for batch in found for number in batch.sequence_ids]
    assert sorted(seen) == list(range(loaders[0].num_sequences))
    assert sum(len(batch.targets.index) for found in batches for batch in found) == loaders[0].target_tokens
    for found in batches:
        for batch in found:
            check_batch(batch, loaders[0].cache) if batch.sequence_ids else None
            assert len(batch.tokens) >= 1 and batch.segments.tokens == len(batch.tokens)
    if size == 16:
        empty = batches[-1][-1]
        assert empty.sequence_ids == () and len(empty.tokens) == 1 and len(empty.targets.index) == 0
    with pytest.raises(IndexError):
        loaders[0].batches()[len(batches[0])]


def test_no_held_out_data(folder: Path, tokenizer: Tokenizer) -> None:
    data = module(folder, tokenizer, eval=None)
    assert data.eval is None and data.report == {"train": {"kept": ROWS}}
    assert "60 samples" in data.describe() and "held out" not in data.describe()
    with_eval = module(folder, tokenizer)
    assert with_eval.digest == data.digest != module(folder, tokenizer, packing=False).digest
    assert "held out: 11 samples" in with_eval.describe()


@pytest.mark.parametrize(
    ("size", "batch", "micro", "message"),
    [
        (
            4,
            6,
            1,
            "6 sequences do not split into micro-batches of 1 on 4 data-parallel processes; use 4 or 8",
        ),
        (2, 2, 4, "2 sequences do not split into micro-batches of 4 on 2 data-parallel processes; use 8"),
    ],
)
def test_batch_sizes_that_do_not_split(
    folder: Path, tokenizer: Tokenizer, size: int, batch: int, micro: int, message: str
) -> None:
    with pytest.raises(ParallelError, match=message):
        module(folder, tokenizer, 0, size, global_batch_size=batch, micro_batch_size=micro)


def test_more_processes_than_sequences(folder: Path, tokenizer: Tokenizer) -> None:
    count = module(folder, tokenizer).train.num_sequences
    size = count + 1
    with pytest.raises(
        DataError, match=f"{count} packed sequences are fewer than the {size} data-parallel processes"
    ):
        module(folder, tokenizer, 0, size, global_batch_size=size)


def test_other_processes_do_not_make_the_cache(tokenizer: Tokenizer, tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", tiny_rows(9))
    settings = config(tmp_path, train, seq_length=96, train_section={"global_batch_size": 2})
    with pytest.raises(
        DataError, match=r"process 1 finds no token cache in .*folder that all machines share"
    ):
        build(settings, tokenizer, dp_rank=1, dp_size=2, wait=0.05)
    assert build(settings, tokenizer, dp_rank=0, dp_size=2).train.cache.num_samples == 9
    assert build(settings, tokenizer, dp_rank=1, dp_size=2, wait=0).train.cache.num_samples == 9


def test_a_batch_moves_with_all_it_has(folder: Path, tokenizer: Tokenizer) -> None:
    batch = module(folder, tokenizer).train.step(0)[0]
    moved = batch.to("meta")
    assert {
        moved.tokens.device.type,
        moved.segments.positions.device.type,
        moved.targets.labels.device.type,
    } == {"meta"}
    assert (moved.sequence_ids, moved.sample_ids, moved.index) == (
        batch.sequence_ids,
        batch.sample_ids,
        batch.index,
    )


def test_the_loader_alone(folder: Path, tokenizer: Tokenizer) -> None:
    cache = module(folder, tokenizer).train.cache
    loader = TrainLoader(cache, seed=3, global_batch_size=8, micro_batch_size=1)
    assert same(loader.step(0)[0], module(folder, tokenizer).train.step(0)[0])
