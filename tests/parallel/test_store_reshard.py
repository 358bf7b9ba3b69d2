"""Checkpoints by several processes: any layout in, any layout out, and one verdict for all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatune.checkpoint import files, store
from megatune.checkpoint.manifest import read_manifest
from megatune.config.schema import ParallelConfig
from megatune.errors import CheckpointError
from megatune.parallel.shard import Box, Fused, Parts, ShardSpec
from megatune.parallel.world import World, init
from tests.helpers.dist import run_ranks
from tests.helpers.parts import check, held, shards, worlds

LAYERS = 3
QKV = Fused((("q", 8), ("k", 4), ("v", 4)), 2)  # fewer KV heads than processes of tp4
GATE_UP = Fused((("gate", 1), ("up", 1)), 8)
# name -> (number of processes, sizes of the layout)
LAYOUTS: dict[str, dict[str, int]] = {
    "1": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "ep2": {"dp_shard": 2, "ep": 2},
    "tp4": {"tp": 4},
    "fsdp4": {"dp_shard": 2, "cp": 2},
    "fsdp3": {"dp_shard": 3},
    "replicas": {"dp_replicate": 2, "dp_shard": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "tp2-ep2": {"tp": 2, "dp_shard": 2, "ep": 2, "etp": 2},
    "ep4-etp1": {"tp": 2, "dp_shard": 2, "ep": 4},
    "pp3-tp4-ep2": {"pp": 3, "tp": 4, "dp_shard": 2, "ep": 2, "etp": 2},
}


def specs() -> dict[str, ShardSpec]:
    """A vocabulary that divides by nothing, fused rows, columns, experts, what is replicated, adapters."""
    found = [ShardSpec("embed.weight", (131, 6), 0, vocab=True)]
    for index in range(LAYERS):
        at = f"layers.{index}."
        found += [
            ShardSpec(f"{at}attn.qkv.weight", (QKV.rows, 6), 0, QKV),
            ShardSpec(f"{at}attn.qkv.bias", (QKV.rows,), 0, QKV),
            ShardSpec(f"{at}attn.out.weight", (7, 8), 1),
            ShardSpec(f"{at}norm.weight", (7,), partial=True),
            ShardSpec(f"{at}mlp.experts.gate_up.weight", (4, GATE_UP.rows, 5), 1, GATE_UP, expert=True),
            ShardSpec(f"{at}mlp.experts.gate_up.bias", (4, GATE_UP.rows), 1, GATE_UP, expert=True),
            ShardSpec(f"{at}mlp.experts.down.weight", (4, 5, 8), 2, expert=True),
            ShardSpec(f"{at}mlp.experts.down.bias", (4, 5), partial=True, expert=True),
        ]
    found.append(ShardSpec("norm.weight", (7,), partial=True))
    return {spec.name: spec for spec in found}


def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(spec.shape, generator=generator) for name, spec in specs().items()}


def state_of(world: World, *, filled: bool) -> dict[str, torch.Tensor | Parts]:
    """Weights, a moment of each, one tensor of 16 bits, and plain tensors, as this process holds them."""
    mine, whole = held(specs(), world, LAYERS), values()
    state: dict[str, torch.Tensor | Parts] = {}
    for prefix, scale in (("model", 1), ("optim/exp_avg", 3)):
        scaled = {name: value * scale for name, value in whole.items()} if filled else None
        state |= {f"{prefix}/{name}": parts for name, parts in shards(mine, world, scaled).items()}
    half = {"norm.weight": ShardSpec("norm.weight", (7,), partial=True)}
    halves = shards(held(half, world, LAYERS), world, {"norm.weight": torch.arange(7.0).bfloat16()})
    state |= {f"half/{name}": parts for name, parts in halves.items()}
    if not filled:
        clear(state)
    kind = torch.ones if filled else torch.zeros
    return {**state, "steps": kind(()) * 12, "table": kind(1000) * torch.arange(1000.0)}


def clear(state: dict[str, torch.Tensor | Parts]) -> None:
    for value in state.values():
        for _, tensor in value.parts if isinstance(value, Parts) else [(None, value)]:
            tensor.zero_()


def check_state(state: dict[str, torch.Tensor | Parts]) -> int:
    whole = values()
    truth = {f"model/{name}": value for name, value in whole.items()}
    truth |= {f"optim/exp_avg/{name}": value * 3 for name, value in whole.items()}
    truth["half/norm.weight"] = torch.arange(7.0).bfloat16()
    assert torch.equal(state["steps"], torch.tensor(12.0))
    assert torch.equal(state["table"], torch.arange(1000.0))
    return check({name: value for name, value in state.items() if isinstance(value, Parts)}, truth)


def processes_of(name: str) -> int:
    return len(worlds(**LAYOUTS[name]))


def save_rank(rank: int, world_size: int, folder: str) -> dict[str, list[str]]:
    real = init(ParallelConfig(), device="cpu")
    written = {}
    for name, sizes in LAYOUTS.items():
        if processes_of(name) != world_size:
            continue
        state = state_of(worlds(**sizes)[rank], filled=True)
        pending = store.save(f"{folder}/{name}", 4, state, {"saved_by": rank}, real)
        clear(state)
        pending.wait()
        assert store.newest(f"{folder}/{name}") is not None
        written[name] = sorted(n for n in os.listdir(pending.folder) if n.startswith("rank-"))
        # A start under the same layout, by all processes together.
        path, extra = store.restore(f"{folder}/{name}", state, real)
        assert (path.name, extra) == ("step-000004", {"saved_by": 0})
        check_state(state)
    return written


def test_any_layout_to_any_other(tmp_path: Path) -> None:
    written: dict[str, list[str]] = {}
    for world_size in (1, 2, 3, 4):
        written |= run_ranks(save_rank, world_size, str(tmp_path))[0]
    saved = [name for name in LAYOUTS if processes_of(name) <= 4]
    assert sorted(written) == sorted(saved)
    for source in saved:
        folder = tmp_path / source / "step-000004"
        store.verify(folder)
        assert len(written[source]) >= {"replicas": 2}.get(source, processes_of(source))
        for target, sizes in LAYOUTS.items():
            count = 0
            for world in worlds(**sizes):
                state = state_of(world, filled=False)
                assert store.load(folder, state) == {"saved_by": 0}
                count += check_state(state)
            assert count >= 2 * sum(value.numel() for value in values().values()), (source, target)
    chunks = {name: read_manifest(tmp_path / name / "step-000004").tensors for name in saved}
    # Vocabularies are cut unevenly, replicas and what tp replicates are written once, plain tensors whole.
    assert [c.box.shape[0] for c in chunks["tp2"]["model/embed.weight"].chunks] == [66, 65]
    assert len(chunks["tp4"]["model/layers.0.norm.weight"].chunks) == 1
    assert len(chunks["tp4"]["model/layers.0.attn.qkv.weight"].chunks) == 4 * 3
    assert len(chunks["replicas"]["model/embed.weight"].chunks) == len(
        chunks["ep2"]["model/embed.weight"].chunks
    )
    assert all(len(entries["table"].chunks) == 1 for entries in chunks.values())
    assert {c.box.shape for c in chunks["ep4-etp1"]["model/layers.0.mlp.experts.gate_up.weight"].chunks} == {
        (1, 16, 5)
    }


def misfit_rank(rank: int, world_size: int, folder: str) -> list[str]:
    """What does not fit on one process is said by all."""
    real = init(ParallelConfig(), device="cpu")
    world = worlds(pp=2)[rank]
    state = state_of(world, filled=True)
    store.save(folder, 1, state, {}, real).wait()
    cases = [dict(state) for _ in range(4)]
    if rank == 1:
        cases[0]["new"] = Parts((2,), ((Box((0,), (2,)), torch.zeros(2)),), True)
        cases[1]["model/norm.weight"] = Parts((8,), (), True)
        cases[2]["model/norm.weight"] = Parts((7,), ((Box((0,), (7,)), torch.zeros(7).double()),), True)
        del cases[3]["model/norm.weight"]
    messages = []
    for case in cases:
        with pytest.raises(CheckpointError) as caught:
            store.restore(folder, case, real)
        messages.append(str(caught.value))
    broken = dict(state)
    if rank == 1:
        del broken["model/norm.weight"]
    store.save(folder, 2, broken, {}, real).wait()  # a smaller model: all that is there is there exactly once
    del broken["table"]
    if rank == 0:
        broken["model/embed.weight"] = Parts((131, 6), broken["model/embed.weight"].parts * 2, True)
    broken.pop("steps")
    with pytest.raises(CheckpointError) as caught:
        store.save(folder, 3, broken, {}, real).wait()
    return [*messages, str(caught.value)]


def test_names_that_only_some_processes_have(tmp_path: Path) -> None:
    first, second = run_ranks(misfit_rank, 2, str(tmp_path))
    assert first == second
    at = tmp_path / "step-000001"
    assert first == [
        f"{at} lacks new; it was saved from another model or method",
        f"{at}: model/norm.weight has shape (7,), this run needs (8,); it was saved from another model",
        f"{at}: model/norm.weight has dtype torch.float32, this run needs torch.float64; it was saved from another model",
        f"{at} holds model/norm.weight too; it was saved from another model or method",
        "model/embed.weight: its chunks do not cover (131, 6) exactly once",
    ]


def world_and_state(rank: int, world_size: int) -> tuple[World, dict[str, Any]]:
    return init(ParallelConfig(), device="cpu"), state_of(worlds(dp_shard=world_size)[rank], filled=True)


def failing_rank(rank: int, world_size: int, folder: str, bad_rank: int) -> str:
    world, state = world_and_state(rank, world_size)
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


def load_rank(rank: int, world_size: int, folder: str) -> None:
    world, state = world_and_state(rank, world_size)
    clear(state)
    path, extra = store.restore(folder, state, world)
    assert (path.name, extra) == ("step-000004", {"saved_by": 0})
    check_state(state)


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_one_rank_cannot_write(tmp_path: Path, bad_rank: int) -> None:
    messages = run_ranks(failing_rank, 2, str(tmp_path), bad_rank)
    assert messages[0] == messages[1]
    assert f"No space left on device in {tmp_path} (rank {bad_rank})" in messages[0]
    # The note for the others lies there until the next start, which removes it and goes on from the old checkpoint.
    run_ranks(load_rank, 2, str(tmp_path))
    assert os.listdir(tmp_path) == ["step-000004"]


def silent_rank(rank: int, world_size: int, folder: str) -> str:
    """Rank 1 writes to a folder of its own, as without a shared file system."""
    mine = folder if rank == 0 else f"{folder}-elsewhere"
    os.makedirs(mine, exist_ok=True)
    world, state = world_and_state(rank, world_size)
    with pytest.raises(CheckpointError) as caught:
        store.save(mine, 1, state, {}, world, timeout=0.5).wait()
    return str(caught.value)


def test_a_folder_that_is_not_shared_is_said(tmp_path: Path) -> None:
    messages = run_ranks(silent_rank, 2, str(tmp_path / "run"))
    assert "no file of rank 1 came within 0.5 s" in messages[0]
    assert "that all nodes share" in messages[0]
    assert "rank 1" in messages[1]
    assert store.steps(tmp_path / "run") == []


def unequal_rank(rank: int, world_size: int, folder: str) -> str:
    world = init(ParallelConfig(), device="cpu")
    state = {"steps": torch.tensor(1), **({"more": torch.tensor(2)} if rank else {})}
    with pytest.raises(CheckpointError) as caught:
        store.save(folder, 1, state, {}, world).wait()
    return str(caught.value)


def test_plain_tensors_must_be_the_same_everywhere(tmp_path: Path) -> None:
    messages = run_ranks(unequal_rank, 2, str(tmp_path))
    assert messages[0] == messages[1]
    assert "do not hold the same plain tensors" in messages[0]


def damaged_rank(rank: int, world_size: int, folder: str) -> str:
    world, state = world_and_state(rank, world_size)
    store.save(folder, 4, state, {"saved_by": 0}, world).wait()
    store.save(folder, 8, state, {"saved_by": 1}, world).wait()
    if rank == 0:  # only what rank 1 reads is damaged
        path = Path(folder) / "step-000008" / "rank-00001.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    dist.barrier()
    reasons: list[str] = []
    clear(state)
    path, _ = store.restore(folder, state, world, reasons.append)
    assert path.name == "step-000004"
    check_state(state)
    return reasons[0]


def test_damage_seen_by_one_rank_sends_all_to_the_older_one(tmp_path: Path) -> None:
    reasons = run_ranks(damaged_rank, 2, str(tmp_path))
    assert all("step-000008 is passed over" in reason for reason in reasons)
    assert any("rank-00001.safetensors is damaged" in reason for reason in reasons)
