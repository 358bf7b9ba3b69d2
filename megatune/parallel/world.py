"""The processes of a run: ranks, device, process groups and the device mesh."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatune.config.schema import ParallelConfig
from megatune.errors import ParallelError


@dataclass(frozen=True)
class World:
    """This process's place in the run.

    `mesh` has the dimensions (dp_replicate, dp_shard), outermost first. Data parallel rank and size count both:
    every process sees its own share of the global batch. `owns_group`: `init` started the process group.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    mesh: DeviceMesh
    owns_group: bool = True

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        return self.rank

    @property
    def dp_size(self) -> int:
        return self.world_size

    def barrier(self) -> None:
        """Wait for all processes (on the host: works for every backend and needs no device)."""
        if self.world_size > 1:
            self.sum([0.0])

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum of each value over all processes, in fp64 on the host."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """Largest of each value over all processes."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        if self.world_size == 1:
            return list(values)
        packed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(packed, op)
        return packed.tolist()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON-like value on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def close(self) -> None:
        """End the process groups, unless a caller had started them before `init`; of no use afterwards."""
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()


def init(config: ParallelConfig, *, device: str | None = None, timeout: float = 1800.0) -> World:
    """Join the other processes of the run (torchrun's environment variables; alone where there are none).

    `device`: "cuda" or "cpu"; default: GPUs where there are some. `timeout`: seconds for one collective.
    Raises ParallelError where the layout does not fit the number of processes.
    """
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    check_layout(config, world_size)
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    where = _device(kind, local_rank)
    owns_group = not dist.is_initialized()
    if owns_group:
        _start_process_group(kind, where, rank, world_size, timeout)
    shape = mesh_shape(config, world_size)
    mesh = init_device_mesh(kind, shape, mesh_dim_names=("dp_replicate", "dp_shard"))
    return World(rank, world_size, local_rank, where, mesh, owns_group)


def check_layout(config: ParallelConfig, world_size: int) -> None:
    """Raise ParallelError where `world_size` processes cannot take this layout."""
    for name in ("tensor", "pipeline", "context", "expert"):
        size = getattr(config, name)
        if size > 1:
            raise ParallelError(
                f"parallel.{name}: {size} is not supported by this version of megatune yet; set it to 1 and use "
                f"parallel.zero (0 to 3) and parallel.replicate"
            )
    if config.schedule != "1f1b":
        raise ParallelError(
            f"parallel.schedule: {config.schedule} is for parallel.pipeline above 1, which this version does not have; "
            f"leave it out"
        )
    if world_size % config.replicate:
        raise ParallelError(
            f"parallel.replicate: {config.replicate} does not divide the {world_size} processes of this run"
        )


def mesh_shape(config: ParallelConfig, world_size: int) -> tuple[int, int]:
    """(dp_replicate, dp_shard): ZeRO stage 0 keeps a whole copy on every process."""
    replicate = world_size if config.zero == 0 else config.replicate
    return replicate, world_size // replicate


def _device(kind: str, local_rank: int) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ParallelError(
            f"local rank {local_rank} has no GPU: this machine shows {torch.cuda.device_count()}; "
            f"start at most that many processes here (launch.nproc or torchrun --nproc-per-node)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _start_process_group(kind: str, where: torch.device, rank: int, world_size: int, timeout: float) -> None:
    limit = timedelta(seconds=timeout)
    if "MASTER_ADDR" not in os.environ:
        if world_size > 1:
            raise ParallelError(
                "WORLD_SIZE is set but MASTER_ADDR is not: start with megatune train or torchrun"
            )
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
        return
    # Both backends: tensors on the host (flags, losses) go over gloo and never wait for the device.
    if kind == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=limit, device_id=where)
    else:
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=limit)
