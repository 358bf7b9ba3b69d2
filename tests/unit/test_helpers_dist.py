"""The helper that runs ranks: results, failures, time-outs, nothing left behind."""

from __future__ import annotations

import os
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.helpers.dist import RankError, run_ranks


def _sum_over_ranks(rank: int, world_size: int, offset: torch.Tensor) -> torch.Tensor:
    value = torch.tensor([float(rank)]) + offset
    dist.all_reduce(value)
    return value


def _environment(rank: int, world_size: int) -> tuple[str, str, bool, int]:
    return os.environ["RANK"], os.environ["WORLD_SIZE"], dist.is_initialized(), torch.get_num_threads()


def _fail_on_one(rank: int, world_size: int, bad: int) -> None:
    if rank == bad:
        raise ValueError(f"rank {rank} says no")
    dist.barrier()


def _die(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def _stuck_in_here(rank: int, world_size: int, path: str) -> None:
    with open(f"{path}/{rank}", "w") as file:
        file.write(str(os.getpid()))
    if rank == 0:
        time.sleep(60)


def test_results_come_by_rank() -> None:
    results = run_ranks(_sum_over_ranks, 3, torch.tensor([10.0]))
    assert [r.item() for r in results] == [33.0, 33.0, 33.0]


def test_without_a_process_group_only_the_environment_is_set() -> None:
    assert run_ranks(_environment, 2, init=False) == [("0", "2", False, 1), ("1", "2", False, 1)]


@pytest.mark.parametrize("bad", [0, 1])
def test_the_failing_rank_is_named_first(bad: int) -> None:
    with pytest.raises(RankError, match=rf"(?s)^rank {bad} of 2 failed:.*ValueError: rank {bad} says no"):
        run_ranks(_fail_on_one, 2, bad)


def test_a_rank_that_dies_is_reported() -> None:
    with pytest.raises(RankError, match="rank 1 of 2 failed:\nthe process died with exit code 7"):
        run_ranks(_die, 2)


def test_time_out_shows_the_stack_and_leaves_no_process(tmp_path) -> None:
    with pytest.raises(RankError, match=r"(?s)1 of 2 ranks did not return within 2 s.*_stuck_in_here"):
        run_ranks(_stuck_in_here, 2, str(tmp_path), timeout=2)
    for rank in range(2):
        assert not psutil.pid_exists(int((tmp_path / str(rank)).read_text()))
