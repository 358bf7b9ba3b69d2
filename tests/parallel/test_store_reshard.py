"""Checkpoints by several processes: any sharding in, any sharding out, and one verdict for all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from megatune.checkpoint import files, store
from megatune.checkpoint.boxes import local_part
from megatune.checkpoint.manifest import read_manifest
from megatune.errors import CheckpointError
from tests.helpers.dist import run_ranks


class World:
    """The part of a world that the store uses, over the default process group."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.is_main = rank, world_size, rank == 0

    def broadcast(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def max(self, values: list[float]) -> list[float]:
        packed = torch.tensor(values)
        dist.all_reduce(packed, dist.ReduceOp.MAX)
        return packed.tolist()


def make_model() -> nn.Module:
    """Rows that divide by nothing, fewer rows than processes, a bias, a bf16 weight."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 13, bias=False), nn.Linear(13, 2))
    model[1].bfloat16()
    return model


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    state = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    slots = {f"optim/exp_avg/{name}": p.detach() * 3 for name, p in model.named_parameters()}
    return {**state, **slots, "steps": torch.tensor(12), "table": torch.arange(1000.0)}


def sharded_state(rank: int, world_size: int, replicate: int) -> dict[str, torch.Tensor]:
    model = make_model()
    if world_size > 1:
        shape = (replicate, world_size // replicate)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp_replicate", "dp_shard"))
        for layer in model:
            fully_shard(layer, mesh=mesh if replicate > 1 else mesh["dp_shard"])
    return state_of(model)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_against_truth(state: dict[str, torch.Tensor]) -> None:
    truth = state_of(make_model())
    assert state.keys() == truth.keys()
    for name, tensor in state.items():
        assert torch.equal(full(tensor), truth[name]), name


def save_rank(rank: int, world_size: int, folder: str, replicate: int) -> list[str]:
    state = sharded_state(rank, world_size, replicate)
    if world_size > 1:
        assert any(isinstance(t, DTensor) for t in state.values())
    pending = store.save(folder, 4, state, {"saved_by": rank}, World(rank, world_size))
    for tensor in state.values():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local.zero_()
    pending.wait()
    assert store.newest(folder) is not None
    return sorted(name for name in os.listdir(pending.folder) if name.startswith("rank-"))


def load_rank(rank: int, world_size: int, folder: str, replicate: int) -> None:
    state = sharded_state(rank, world_size, replicate)
    for tensor in state.values():
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
    path, extra = store.restore(folder, state, World(rank, world_size))
    assert path.name == "step-000004"
    assert extra == {"saved_by": 0}
    check_against_truth(state)


def test_any_number_of_processes_to_any_other(tmp_path: Path) -> None:
    layouts = [(1, 1), (2, 1), (3, 1), (4, 2)]
    for world_size, replicate in layouts:
        folder = tmp_path / f"{world_size}-{replicate}"
        written = run_ranks(save_rank, world_size, str(folder), replicate)
        writers = world_size // replicate
        # Replicas write no shard twice; plain tensors are dealt out, so further ranks may write one of these.
        assert len(written[0]) >= writers
        manifest = read_manifest(folder / "step-000004")
        chunks = manifest.tensors["model/0.weight"].chunks
        assert len(chunks) == min(7, writers)
        assert len(manifest.tensors["table"].chunks) == 1
        assert len(manifest.tensors["model/2.weight"].chunks) == min(2, writers)  # no chunk for empty shards
    for source, target in [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (2, 1), (1, 2), (2, 3)]:
        folder = tmp_path / "{}-{}".format(*layouts[source])
        run_ranks(load_rank, layouts[target][0], str(folder), layouts[target][1])


def placements_rank(rank: int, world_size: int, folder: str) -> None:
    """Boxes of every kind: columns, both dimensions, one dimension cut twice, unevenly, replicated."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    torch.manual_seed(1)
    whole = torch.randn(5, 7, 3)
    kinds = [
        (Shard(1), Replicate()),
        (Replicate(), Shard(2)),
        (Shard(0), Shard(1)),
        (Shard(1), Shard(0)),
        (Shard(1), Shard(1)),
        (Shard(0), Shard(0)),
        (Replicate(), Replicate()),
    ]
    state = {str(i): distribute_tensor(whole, mesh, kind) for i, kind in enumerate(kinds)}
    store.save(folder, 1, state, {}, World(rank, world_size)).wait()
    # Each is read back under each other placement.
    for shift in range(len(kinds)):
        target = {
            str(i): distribute_tensor(torch.zeros_like(whole), mesh, kinds[(i + shift) % len(kinds)])
            for i in range(len(kinds))
        }
        store.load(Path(folder) / "step-000001", target)
        for name, tensor in target.items():
            part = local_part(name, tensor)
            index = tuple(slice(o, o + n) for o, n in zip(part.box.offset, part.box.shape, strict=True))
            assert torch.equal(part.tensor, whole[index].reshape(part.tensor.shape))
            assert torch.equal(tensor.full_tensor(), whole)


def test_boxes_of_any_dimension(tmp_path: Path) -> None:
    run_ranks(placements_rank, 4, str(tmp_path))
    manifest = read_manifest(tmp_path / "step-000001")
    assert [len(manifest.tensors[str(i)].chunks) for i in range(7)] == [2, 2, 4, 4, 4, 4, 1]


def failing_rank(rank: int, world_size: int, folder: str, bad_rank: int) -> str:
    world = World(rank, world_size)
    state = sharded_state(rank, world_size, 1)
    store.save(folder, 4, state, {"saved_by": rank}, world).wait()
    if rank == bad_rank:
        write = files.write

        def full_disk(descriptor: int, data: Any) -> None:
            if len(data) > 300:  # the tensors; small notes still fit
                raise OSError(28, "No space left on device")
            write(descriptor, data)

        files.write = full_disk
    pending = store.save(folder, 5, state, {}, world)
    with pytest.raises(CheckpointError) as caught:
        pending.wait()
    dist.barrier()
    assert [name for name in os.listdir(folder) if not name.endswith(".failed")] == ["step-000004"]
    return str(caught.value)


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_one_rank_cannot_write(tmp_path: Path, bad_rank: int) -> None:
    messages = run_ranks(failing_rank, 2, str(tmp_path), bad_rank)
    assert messages[0] == messages[1]
    assert f"No space left on device in {tmp_path} (rank {bad_rank})" in messages[0]
    # The note for the others lies there until the next start, which removes it and goes on from the old checkpoint.
    run_ranks(load_rank, 2, str(tmp_path), 1)
    assert os.listdir(tmp_path) == ["step-000004"]


def silent_rank(rank: int, world_size: int, folder: str) -> str:
    """Rank 1 writes to a folder of its own, as without a shared file system."""
    mine = folder if rank == 0 else f"{folder}-elsewhere"
    os.makedirs(mine, exist_ok=True)
    state = sharded_state(rank, world_size, 1)
    with pytest.raises(CheckpointError) as caught:
        store.save(mine, 1, state, {}, World(rank, world_size), timeout=0.5).wait()
    return str(caught.value)


def test_a_folder_that_is_not_shared_is_said(tmp_path: Path) -> None:
    messages = run_ranks(silent_rank, 2, str(tmp_path / "run"))
    assert "no file of rank 1 came within 0.5 s" in messages[0]
    assert "that all nodes share" in messages[0]
    assert "rank 1" in messages[1]
    assert store.steps(tmp_path / "run") == []


def unequal_rank(rank: int, world_size: int, folder: str) -> str:
    world = World(rank, world_size)
    state = {"steps": torch.tensor(1), **({"more": torch.tensor(2)} if rank else {})}
    with pytest.raises(CheckpointError) as caught:
        store.save(folder, 1, state, {}, world).wait()
    return str(caught.value)


def test_plain_tensors_must_be_the_same_everywhere(tmp_path: Path) -> None:
    messages = run_ranks(unequal_rank, 2, str(tmp_path))
    assert messages[0] == messages[1]
    assert "do not hold the same plain tensors" in messages[0]


def damaged_rank(rank: int, world_size: int, folder: str) -> str:
    state = sharded_state(rank, world_size, 1)
    world = World(rank, world_size)
    store.save(folder, 4, state, {"saved_by": 0}, world).wait()
    store.save(folder, 8, state, {"saved_by": 1}, world).wait()
    if rank == 0:  # only what rank 1 reads is damaged
        path = Path(folder) / "step-000008" / "rank-00001.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    dist.barrier()
    reasons: list[str] = []
    mine = {name: tensor for name, tensor in state.items() if isinstance(tensor, DTensor)}
    for tensor in mine.values():
        tensor.to_local().zero_()
    path, _ = store.restore(folder, state, world, reasons.append)
    assert path.name == "step-000004"
    check_against_truth(state)
    return reasons[0]


def test_damage_seen_by_one_rank_sends_all_to_the_older_one(tmp_path: Path) -> None:
    reasons = run_ranks(damaged_rank, 2, str(tmp_path))
    assert all("step-000008 is passed over" in reason for reason in reasons)
    assert any("rank-00001.safetensors is damaged" in reason for reason in reasons)


def partial_rank(rank: int, world_size: int, folder: str) -> str:
    from torch.distributed.tensor import Partial

    mesh = init_device_mesh("cpu", (2,))
    tensor = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    with pytest.raises(CheckpointError) as caught:
        store.save(folder, 1, {"p": tensor}, {}, World(rank, world_size))
    return str(caught.value)


def test_partial_sums_are_refused(tmp_path: Path) -> None:
    assert all("p: placement" in message for message in run_ranks(partial_rank, 2, str(tmp_path)))
