"""The processes of a run: ranks, device, process groups and the axes of the layout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatune.config.layout import Layout, layout_of
from megatune.config.schema import ParallelConfig
from megatune.errors import ParallelError
from megatune.parallel.rendezvous import fresh_store, store_outlives_restarts
from megatune.parallel.shard import Cut


@dataclass(frozen=True)
class Axis:
    """One dimension of the layout as this process sees it: its line of `size` processes, of which it is number `rank`.

    `ranks`: their global ranks. `group`: their process group, None where the line is this process alone.
    """

    name: str
    size: int = 1
    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = field(default=None, compare=False)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1


@dataclass(frozen=True)
class World:
    """This process's place in the run.

    Axes, outermost first: `pp`, `dp_replicate`, `dp_shard`, `cp`, `tp`. `fsdp` is dp_shard x cp in one: over it the
    dense parameters are sharded (ZeRO) and their gradients summed. `config`: the options of the layout. Expert
    parameters see the same processes otherwise: dp_shard x cp x tp in another order of cuts, `efsdp` (their fsdp),
    `ep`, `etp`. `owns_group`: `init` started the process group.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    layout: Layout
    pp: Axis
    dp_replicate: Axis
    dp_shard: Axis
    cp: Axis
    tp: Axis
    fsdp: Axis
    efsdp: Axis
    ep: Axis
    etp: Axis
    config: ParallelConfig = field(default_factory=ParallelConfig)
    meshes: dict[str, DeviceMesh] = field(default_factory=dict, compare=False)
    owns_group: bool = True

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> World:
        """One process without process groups: models for chat, export, planning and tests."""
        axes = {name: Axis(name) for name in AXES}
        return cls(0, 1, 0, torch.device(device), Layout(), **axes, owns_group=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        """Which share of the global batch this process sees; the processes of a pp, cp or tp line see the same."""
        return self.dp_replicate.rank * self.dp_shard.size + self.dp_shard.rank

    @property
    def dp_size(self) -> int:
        return self.dp_replicate.size * self.dp_shard.size

    @property
    def cut(self) -> Cut:
        """Which slices of the weights this process holds."""
        return Cut(*((axis.rank, axis.size) for axis in (self.tp, self.ep, self.etp)))

    @property
    def token_multiple(self) -> int:
        """Streams are padded to a multiple of this many tokens, so that context (two pieces each, zigzag) and sequence
        parallelism cut them evenly."""
        return 2 * self.cp.size * self.tp.size if self.cp.size > 1 else self.tp.size

    def fsdp_mesh(self, expert: bool = False) -> DeviceMesh:
        """Mesh for `fully_shard`: (fsdp,) or (dp_replicate, fsdp); of the expert parameters where `expert`."""
        mesh = self.meshes["expert" if expert else "dense"]
        shard = "efsdp" if expert else "fsdp"
        return mesh["dp_replicate", shard] if self.dp_replicate.size > 1 else mesh[shard]

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

    def gather_objects(self, value: Any) -> list[Any]:
        """Everyone's JSON-like value, by rank, on rank 0; an empty list on the others."""
        if self.world_size == 1:
            return [value]
        found = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, found, dst=0)
        return found or []

    def close(self) -> None:
        """End the process groups: all of them, or those of the layout alone where a caller had started the default one
        before `init`; of no use afterwards."""
        if not dist.is_initialized():
            return
        if self.owns_group:
            dist.destroy_process_group()
            return
        lines = [mesh.get_all_groups() for mesh in self.meshes.values()]
        for group in {id(group): group for groups in lines for group in groups}.values():
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)


AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "fsdp", "efsdp", "ep", "etp")


def init(config: ParallelConfig, *, device: str | None = None, timeout: float = 1800.0) -> World:
    """Join the other processes of the run (torchrun's environment variables; alone where there are none).

    `device`: "cuda" or "cpu"; default: GPUs where there are some. `timeout`: seconds for one collective.
    Raises ParallelError where the layout does not fit the number of processes.
    """
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    layout = layout_of(config, world_size)
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    where = _device(kind, local_rank)
    owns_group = not dist.is_initialized()
    if owns_group:
        _start_process_group(kind, where, rank, world_size, timeout)
    return make_world(config, layout, rank, local_rank, where, owns_group)


def make_world(
    config: ParallelConfig,
    layout: Layout,
    rank: int,
    local_rank: int,
    device: torch.device,
    owns_group: bool = False,
) -> World:
    """The world of `rank` under `layout`, with a process group for each axis; the default group must be up."""
    common = {"config": config, "owns_group": owns_group}
    if layout.world_size == 1:
        alone = {name: Axis(name) for name in AXES}
        meshes = {
            name: init_device_mesh(device.type, (1,), mesh_dim_names=(axis,))
            for name, axis in (("dense", "fsdp"), ("expert", "efsdp"))
        }
        return World(rank, 1, local_rank, device, layout, **alone, meshes=meshes, **common)
    axes: dict[str, Axis] = {}
    meshes = {}
    sizes = layout.sizes()
    for which, names in _MESHES.items():
        # Axes of one process need no group; the sharded one stays, so that `fully_shard` has a mesh.
        kept = [name for name in names if sizes[name] > 1 or name in ("fsdp", "efsdp")]
        meshes[which] = mesh = init_device_mesh(
            device.type, tuple(sizes[name] for name in kept), mesh_dim_names=tuple(kept)
        )
        for name in names:
            if name not in axes:
                axes[name] = _axis(mesh, name, rank, sizes[name])
    return World(rank, layout.world_size, local_rank, device, layout, **axes, meshes=meshes, **common)


# Three ways to see the same processes; an axis takes its group from the first that has it.
_MESHES = {
    "dense": ("pp", "dp_replicate", "fsdp", "tp"),
    "data": ("pp", "dp_replicate", "dp_shard", "cp", "tp"),
    "expert": ("pp", "dp_replicate", "efsdp", "ep", "etp"),
}


def _axis(mesh: DeviceMesh, name: str, rank: int, size: int) -> Axis:
    if size == 1:
        return Axis(name, 1, 0, (rank,))
    line = mesh[name]
    ranks = tuple(line.mesh.flatten().tolist())
    return Axis(name, size, line.get_local_rank(), ranks, line.get_group())


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
    backend, device = ("cpu:gloo,cuda:nccl", where) if kind == "cuda" else ("gloo", None)
    common = {"rank": rank, "world_size": world_size, "timeout": limit, "device_id": device}
    if store_outlives_restarts():
        common["store"] = fresh_store(rank, world_size, timeout)
    dist.init_process_group(backend, **common)
