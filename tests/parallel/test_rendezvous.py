"""Starts that share torchrun's store: each finds its own processes only, whatever the earlier ones left there."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist

from megatune import parallel
from megatune.config.schema import ParallelConfig
from megatune.errors import ParallelError
from megatune.parallel.rendezvous import fresh_store
from tests.helpers.dist import run_ranks


def _start_again(rank: int, world_size: int, late: int) -> list[float]:
    sums = []
    for start in range(3):
        if start and rank == late:
            time.sleep(1.0)
        world = parallel.init(ParallelConfig(), device="cpu", timeout=30.0)
        value = torch.tensor([10.0**start * (rank + 1)])
        dist.all_reduce(value)
        sums.append(value.item())
        world.close()
    return sums


@pytest.mark.parametrize("late", [0, 1])
def test_a_start_after_another_finds_its_own_processes(late: int) -> None:
    assert run_ranks(_start_again, 2, late, init=False) == [[3.0, 30.0, 300.0]] * 2


@pytest.fixture
def torchruns_store(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


def _all_meet(found: dict[int, dist.Store], world_size: int) -> None:
    threads = [
        threading.Thread(target=lambda r=rank: found.setdefault(r, fresh_store(r, world_size, 20.0)))
        for rank in reversed(range(world_size))
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    for thread in threads:
        thread.join()
    found[0].set("who", "us")
    assert [store.get("who") for store in found.values()] == [b"us"] * world_size


def test_a_store_that_has_all_its_ranks_is_of_an_earlier_start(torchruns_store: dist.TCPStore) -> None:
    before, now = {}, {}
    _all_meet(before, 2)
    # Its rank 0 lives on while the others are started again, as on another machine that is slower to notice.
    _all_meet(now, 3)
    assert now[0].port != before[0].port


def test_a_rank_0_that_died_while_it_waited_is_not_waited_for(torchruns_store: dist.TCPStore) -> None:
    torchruns_store.set("megatune/port", "1")  # nothing listens there
    _all_meet({}, 2)


def test_ranks_that_never_come(torchruns_store: dist.TCPStore) -> None:
    with pytest.raises(ParallelError, match="the 2 processes of this run did not all meet within 0.5 s"):
        fresh_store(0, 2, 0.5)
    with pytest.raises(ParallelError, match="rank 1: the 2 processes"):
        fresh_store(1, 2, 0.5)
