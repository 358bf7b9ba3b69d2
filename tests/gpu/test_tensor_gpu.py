"""Tensor parallel layers over NCCL, large enough that communication goes in pieces: equal to one GPU. Needs 2 GPUs.

Tolerances, relative to the largest value: fp32 1e-4, bf16 2e-2 (sums over the processes are rounded once more). With
MEGATUNE_RESULTS=folder the times of a layer of an 8B model are written to tensor_overlap.json there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from megatune import parallel
from megatune.config.schema import ParallelConfig
from megatune.parallel import World, linear
from tests.helpers.dist import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
TOKENS, HIDDEN, INNER = 8192, 4096, 14336


def _layers(
    world: World, x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, *, overlap: bool
) -> torch.Tensor:
    """x [T / n, H] -> [T / n, H] through a column and a row layer."""
    inner = linear.column(x, up, None, None, world.tp, overlap)
    return linear.row(inner, down, None, None, world.tp, False, overlap)


def _run(rank: int, world_size: int, dtype: torch.dtype) -> dict[str, float]:
    world = parallel.init(ParallelConfig(tensor=world_size), device="cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator().manual_seed(0)
    x, up, down, weight = (
        (torch.randn(shape, generator=generator) * scale).to("cuda", dtype)
        for shape, scale in (
            ((TOKENS, HIDDEN), 1.0),
            ((INNER, HIDDEN), HIDDEN**-0.5),
            ((HIDDEN, INNER), INNER**-0.5),
            ((TOKENS, HIDDEN), 1.0),
        )
    )
    whole = [t.detach().requires_grad_() for t in (x, up, down)]
    expected = (whole[0] @ whole[1].t()) @ whole[2].t()
    (expected * weight).sum().backward()
    mine = [
        x.chunk(world_size)[rank].clone().requires_grad_(),
        up.chunk(world_size)[rank].clone().requires_grad_(),
        down.chunk(world_size, 1)[rank].contiguous().requires_grad_(),
    ]
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    seconds = {}
    for overlap in (False, True):
        for tensor in mine:
            tensor.grad = None
        out = _layers(world, *mine, overlap=overlap)
        (out * weight.chunk(world_size)[rank]).sum().backward()
        pairs = [
            (out, expected.chunk(world_size)[rank]),
            (mine[0].grad, whole[0].grad.chunk(world_size)[rank]),
            (mine[1].grad, whole[1].grad.chunk(world_size)[rank]),
            (mine[2].grad, whole[2].grad.chunk(world_size, 1)[rank]),
        ]
        for place, (found, true) in enumerate(pairs):
            error = float((found - true).abs().max() / true.abs().max())
            assert error < limit, (overlap, place, error)
        seconds["pieces" if overlap else "one collective"] = _seconds(world, mine, weight, overlap)
    return seconds


def _seconds(world: World, mine: list[torch.Tensor], weight: torch.Tensor, overlap: bool) -> float:
    """Median time of forward and backward."""
    grad = weight.chunk(world.tp.size)[world.tp.rank]
    times = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.distributed.barrier(world.tp.group)
        start.record()
        _layers(world, *mine, overlap=overlap).backward(grad)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times[5:])[5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_layers_in_pieces_equal_one_gpu(dtype: torch.dtype) -> None:
    seconds = run_ranks(_run, 2, dtype, backend="nccl", timeout=200)[0]
    folder = os.environ.get("MEGATUNE_RESULTS")
    if folder and dtype == torch.bfloat16:
        result = {
            "gpu": torch.cuda.get_device_name(),
            "gpus": 2,
            "torch": torch.__version__,
            "shape": {"tokens": TOKENS, "hidden": HIDDEN, "inner": INNER, "dtype": "bf16"},
            "forward and backward, s": {name: float(f"{value:.4g}") for name, value in seconds.items()},
        }
        (Path(folder) / "tensor_overlap.json").write_text(json.dumps(result, indent=1) + "\n")
