"""Best-fit packing: the rule, its bound, and the compiled extension against the reference."""

from __future__ import annotations

import os
import sys
import threading

import numpy as np
import pytest

from megatune.data import packing
from megatune.data.packing import best_fit, best_fit_reference, sequence_index, sequence_index_reference


def by_the_rule(lengths: list[int], capacity: int) -> list[int]:
    """The rule word by word, by looking at every bin."""
    room: list[int] = []
    bins = [-1] * len(lengths)
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [(left, number) for number, left in enumerate(room) if left >= lengths[item]]
        if fitting:
            bins[item] = min(fitting)[1]
        else:
            bins[item] = len(room)
            room.append(capacity)
        room[bins[item]] -= lengths[item]
    return bins


def random_cases() -> list[tuple[np.ndarray, int]]:
    random = np.random.default_rng(0)
    cases = []
    for _ in range(60):
        capacity = int(random.integers(1, 200))
        lengths = random.integers(1, capacity + 1, int(random.integers(0, 120)))
        cases.append((lengths, capacity))
        cases.append((np.minimum(random.geometric(0.1, 80), capacity), capacity))
    return cases


@pytest.mark.parametrize("pack", [best_fit, best_fit_reference])
def test_nothing_overflows_and_all_are_there_once(pack) -> None:
    for lengths, capacity in random_cases():
        bins = pack(lengths, capacity)
        assert bins.shape == lengths.shape and bins.dtype == np.int64
        if len(lengths):
            used = np.bincount(bins, weights=lengths)
            assert used.max() <= capacity and used.min() >= 1  # bins are numbered without gaps
            # No two bins could be one: the first sample of the later one did not fit into the earlier one.
            assert len(used) == 1 or np.sort(used)[:2].sum() > capacity


def test_reference_follows_the_rule() -> None:
    for lengths, capacity in random_cases():
        assert best_fit_reference(lengths, capacity).tolist() == by_the_rule(lengths.tolist(), capacity)


@pytest.fixture(params=["extension", "reference"])
def bodies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test with the compiled extension and without it."""
    if request.param == "reference":
        monkeypatch.setattr(packing, "_pack", None)
    elif packing._pack is None:
        pytest.skip("the extension is not built")


def shapes_of_lengths(samples: int) -> dict[str, tuple[np.ndarray, int]]:
    """Lengths that take each way through the extension, (lengths, capacity) by name."""
    random = np.random.default_rng(2)
    text = np.clip(random.lognormal(6.0, 1.2, samples), 1, 4096).astype(np.int64)
    halves = np.where(np.arange(samples) % 2 == 0, 601, 399)
    falling = np.sort(random.integers(1, 8193, samples))[::-1].copy()
    return {
        "uniform": (random.integers(1, 4097, samples), 4096),
        "text": (text, 4096),
        "one bin a pair": (halves, 1024),
        "out of order": (np.where(random.random(samples) < 0.5, random.integers(300, 700, samples), 7), 1000),
        "falling": (falling, 8192),
        "ones": (np.ones(samples, dtype=np.int64), 64),
        "all full": (np.full(samples, 5), 5),
        "wide": (random.integers(1, 2**40, samples), 2**40),  # too many amounts of room for a table
        "wide and few": (random.choice([2**33, 2**34 + 1, 3], samples), 2**35),
        "table's end": (random.integers(1, 2**22 + 1, samples), 2**22),
    }


def test_extension_equals_reference() -> None:
    extension = pytest.importorskip("megatune._pack", reason="the extension is not built")
    samples = int(os.environ.get("MEGATUNE_PACK_SAMPLES", "3000"))
    for lengths, capacity in [*random_cases(), *shapes_of_lengths(samples).values()]:
        lengths = lengths.astype(np.int64)
        found = extension.best_fit(lengths, capacity)
        assert found.dtype == np.int64 and np.array_equal(found, best_fit_reference(lengths, capacity))


def test_index_equals_reference() -> None:
    extension = pytest.importorskip("megatune._pack", reason="the extension is not built")
    for lengths, capacity in random_cases():
        bins = best_fit_reference(lengths, capacity)
        count = int(bins.max(initial=-1)) + 1
        targets = lengths // 2
        found = extension.sequence_index(bins, lengths, targets, count)
        for mine, theirs in zip(found, sequence_index_reference(bins, lengths, targets, count), strict=True):
            assert mine.dtype == theirs.dtype == np.int64 and np.array_equal(mine, theirs)


def test_known_index(bodies: None) -> None:
    bins, lengths = np.array([1, 0, 1, 3]), np.array([4, 8, 1, 2])
    starts, samples, tokens, targets = sequence_index(bins, lengths, lengths - 1, 4)
    assert starts.tolist() == [0, 1, 3, 3, 4] and samples.tolist() == [1, 0, 2, 3]
    assert tokens.tolist() == [8, 5, 0, 2] and targets.tolist() == [7, 3, 0, 1]


def test_other_threads_run_meanwhile() -> None:
    extension = pytest.importorskip("megatune._pack", reason="the extension is not built")
    lengths = np.random.default_rng(3).integers(1, 1025, 2_000_000)
    worker = threading.Thread(target=extension.best_fit, args=(lengths, 1024))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        worker.start()
        turns = 0
        while worker.is_alive():
            turns += 1
    finally:
        sys.setswitchinterval(interval)
        worker.join()
    assert turns > 1000  # with the lock held the loop would come round once or twice


def test_known_packing() -> None:
    assert best_fit(np.array([4, 8, 1, 4, 2, 1]), 10).tolist() == [1, 0, 1, 1, 0, 1]
    assert best_fit(np.array([5, 5, 5]), 5).tolist() == [0, 1, 2]


def test_much_fits_tightly() -> None:
    lengths = np.random.default_rng(1).integers(20, 160, 20_000)
    bins = best_fit(lengths, 512)
    assert lengths.sum() / 512 / (bins.max() + 1) > 0.995


@pytest.mark.parametrize(
    ("lengths", "capacity", "message"),
    [
        (np.array([2, 0, 3]), 10, r"lengths\[1\] is 0, must be 1 to 10"),
        (np.array([3, 11]), 10, r"lengths\[1\] is 11, must be 1 to 10"),
        (np.array([-1]), 10, r"lengths\[0\] is -1, must be 1 to 10"),
        (np.array([1, 2**41]), 2**40, rf"lengths\[1\] is {2**41}, must be 1 to {2**40}"),
        (np.array([1]), 0, "capacity is 0, must be 1 or more"),
        (np.array([1.0]), 10, "lengths must be int64.*float64"),
        (np.array([1], dtype=np.int32), 10, "lengths must be int64.*int32"),
        (np.array([1], dtype=">i8"), 10, "lengths must be int64.*>i8"),
        (np.array([[1, 2]]), 10, "lengths must be int64.*1, 2"),
        (np.arange(1, 9)[::2], 10, "lengths must be contiguous, got a stride of 16 bytes"),
        ([1, 2], 10, "lengths must be int64.*list"),
    ],
)
def test_bad_lengths(bodies: None, lengths: np.ndarray, capacity: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"best_fit: {message}"):
        best_fit(lengths, capacity)


@pytest.mark.parametrize(
    ("bins", "lengths", "message"),
    [
        ([0, 3], [1, 1], r"bins\[1\] is 3, must be 0 to 2"),
        ([-1, 0], [1, 1], r"bins\[0\] is -1, must be 0 to 2"),
        ([0, 1], [1], "lengths has 1 items, bins has 2"),
    ],
)
def test_bad_index(bodies: None, bins: list[int], lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=f"sequence_index: {message}"):
        sequence_index(np.array(bins), np.array(lengths), np.ones(2, dtype=np.int64), 3)


def test_the_extension_checks_by_itself() -> None:
    extension = pytest.importorskip("megatune._pack", reason="the extension is not built")
    for lengths in (
        np.array([1.0]),
        np.array([1], dtype=np.int32),
        np.ones((1, 1), np.int64),
        np.arange(9)[1::2],
    ):
        with pytest.raises(ValueError, match="best_fit: lengths must"):
            extension.best_fit(lengths, 10)
