"""The ZeRO engine on real GPUs: reductions on a stream of their own, over NCCL. Needs 2 GPUs (4 for replicas)."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.dist import run_ranks
from tests.parallel.test_zero_engine import every_stage, low_masters

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_stage_equals_plain_torch_on_gpus(world_size: int) -> None:
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    cases = run_ranks(every_stage, world_size, "cuda", backend="nccl", timeout=300)
    assert cases == [20 * (world_size // 2)] * world_size


def test_bf16_weights_without_masters_on_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    run_ranks(low_masters, 2, "cuda", backend="nccl", timeout=300)
