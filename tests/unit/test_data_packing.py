"""Best-fit packing: the rule, its bound, and the compiled extension against the reference."""

from __future__ import annotations

import numpy as np
import pytest

from megatune.data.packing import best_fit, best_fit_reference


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


def test_extension_equals_reference() -> None:
    extension = pytest.importorskip("megatune._pack", reason="the extension is not built")
    for lengths, capacity in random_cases():
        assert extension.best_fit(lengths.astype(np.int64), capacity).tolist() == (
            best_fit_reference(lengths, capacity).tolist()
        )


def test_known_packing() -> None:
    assert best_fit(np.array([4, 8, 1, 4, 2, 1]), 10).tolist() == [1, 0, 1, 1, 0, 1]
    assert best_fit(np.array([5, 5, 5]), 5).tolist() == [0, 1, 2]


def test_much_fits_tightly() -> None:
    lengths = np.random.default_rng(1).integers(20, 160, 20_000)
    bins = best_fit(lengths, 512)
    assert lengths.sum() / 512 / (bins.max() + 1) > 0.995


@pytest.mark.parametrize("lengths", [[0, 3], [3, 11], [-1]])
def test_lengths_out_of_range(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="lengths must be from 1 to 10"):
        best_fit(np.array(lengths), 10)
