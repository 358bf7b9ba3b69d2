"""Checkpoints by several processes: any layout in, any layout out, and one verdict for all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatune.checkpoint import files, store
from megatune.checkpoint.manifest import read_manifest
from megatune.config.schema import ParallelConfig
from megatune.errors import CheckpointError
from megatune.parallel.shard import Box, Fused, Parts, ShardSpec
from megatune.parallel.world import World, init
from tests.helpers.dist import run_ranks
from tests.helpers.parts import check, held, shards, worlds

LAYERS = 2
QKV = Fused((("q", 8), ("k", 4), ("v", 4)), 2)  # fewer KV heads than processes of tp4
GATE_UP = Fused((("gate", 1), ("up", 1)), 8)
LAYOUTS: dict[str, dict[str, int]] = {
    "1": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "ep2": {"dp_shard": 2, "ep": 2},
    "tp4": {"tp": 4},
    "fsdp4": {"dp_shard": 2, "cp": 2},
    "replicas": {"dp_replicate": 2, "dp_shard": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "tp2-ep2": {"tp": 2, "dp_shard": 2, "ep": 2, "etp": 2},
    "ep4-etp1": {"tp": 2, "dp_shard": 2, "ep": 4},
    "pp2-tp4-ep2": {"pp": 2, "tp": 4, "dp_shard": 2, "ep": 2, "etp": 2},
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


def save(name: str, world: World, folder: Path) -> None:
    state = state_of(worlds(**LAYOUTS[name])[world.rank], filled=True)
    pending = store.save(folder / name, 4, state, {"saved_by": world.rank}, world)
    clear(state)
    pending.wait()
    assert store.newest(folder / name) is not None
    # A start under the same layout, by all processes together.
    path, extra = store.restore(folder / name, state, world)
    assert (path.name, extra) == ("step-000004", {"saved_by": 0})
    check_state(state)


def save_rank(rank: int, world_size: int, folder: Path) -> None:
    world = init(ParallelConfig(), device="cpu")
    for name in LAYOUTS:
        if processes_of(name) == world_size:
            save(name, world, folder)


def test_any_layout_to_any_other(tmp_path: Path) -> None:
    save("1", World.alone(), tmp_path)
    for world_size in (2, 4):
        run_ranks(save_rank, world_size, tmp_path)
    saved = [name for name in LAYOUTS if processes_of(name) <= 4]
    for number, source in enumerate(saved):
        folder = tmp_path / source / "step-000004"
        files_there = [path.name for path in folder.glob("rank-*")]
        assert len(files_there) >= {"replicas": 2}.get(source, processes_of(source))
        for target in list(LAYOUTS)[number % 2 :: 2]:
            count = 0
            for world in worlds(**LAYOUTS[target]):
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


def misfits(world: World, folder: Path) -> list[str]:
    """Restores where something does not fit on one process, and a save that does not cover everything once."""
    state = state_of(worlds(pp=2)[world.rank], filled=True)
    store.save(folder, 1, state, {}, world).wait()
    cases = [dict(state) for _ in range(4)]
    if world.rank == 1:
        cases[0]["new"] = Parts((2,), ((Box((0,), (2,)), torch.zeros(2)),), True)
        cases[1]["model/norm.weight"] = Parts((8,), (), True)
        cases[2]["model/norm.weight"] = Parts((7,), ((Box((0,), (7,)), torch.zeros(7).double()),), True)
        del cases[3]["model/norm.weight"]
    messages = [refusal(lambda case=case: store.restore(folder, case, world)) for case in cases]
    if world.rank == 0:
        state["model/embed.weight"] = Parts((131, 6), state["model/embed.weight"].parts * 2, True)
    return [*messages, refusal(lambda: store.save(folder, 3, state, {}, world).wait())]


def refusal(work: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        work()
    return str(caught.value)


def full_disk(world: World, folder: Path, bad_rank: int) -> str:
    """One process cannot write; the next start goes on from the checkpoint before."""
    state = sharded(world)
    store.save(folder, 4, state, {"saved_by": world.rank}, world).wait()
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == bad_rank:
            patch.setattr(files, "write", no_space)
        message = refusal(store.save(folder, 5, state, {}, world).wait)
    world.barrier()
    assert [name for name in os.listdir(folder) if not name.endswith(".failed")] == ["step-000004"]
    world.barrier()
    clear(state)
    path, extra = store.restore(folder, state, world)
    assert (path.name, extra) == ("step-000004", {"saved_by": 0})
    check_state(state)
    assert os.listdir(folder) == ["step-000004"]  # the note for the others is gone
    return message


def sharded(world: World) -> dict[str, torch.Tensor | Parts]:
    return state_of(worlds(dp_shard=world.world_size)[world.rank], filled=True)


def no_space(descriptor: int, data: Any) -> None:
    if len(data) > 300:  # the tensors; small notes still fit
        raise OSError(28, "No space left on device")
    os.write(descriptor, data)


def not_shared(world: World, folder: Path) -> str:
    """Rank 1 writes to a folder of its own, as without a shared file system."""
    mine = folder if world.is_main else folder.with_name("elsewhere")
    mine.mkdir()
    return refusal(lambda: store.save(mine, 1, sharded(world), {}, world, timeout=0.5).wait())


def unequal(world: World, folder: Path) -> str:
    state = {"steps": torch.tensor(1), **({} if world.is_main else {"more": torch.tensor(2)})}
    return refusal(lambda: store.save(folder, 1, state, {}, world).wait())


def damaged(world: World, folder: Path) -> str:
    state = sharded(world)
    store.save(folder, 4, state, {"saved_by": 0}, world).wait()
    store.save(folder, 8, state, {"saved_by": 1}, world).wait()
    if world.is_main:  # only what rank 1 reads is damaged
        path = folder / "step-000008" / "rank-00001.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    world.barrier()
    reasons: list[str] = []
    clear(state)
    path, _ = store.restore(folder, state, world, reasons.append)
    assert path.name == "step-000004"
    check_state(state)
    return reasons[0]


def verdicts_rank(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    world = init(ParallelConfig(), device="cpu")
    return {
        "misfits": misfits(world, folder / "misfits"),
        "disk0": full_disk(world, folder / "disk0", 0),
        "disk1": full_disk(world, folder / "disk1", 1),
        "unequal": unequal(world, folder / "unequal"),
        "damaged": damaged(world, folder / "damaged"),
        "apart": not_shared(world, folder / "apart"),
    }


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """(folder, what each of two processes heard)."""
    folder = tmp_path_factory.mktemp("verdicts")
    return folder, run_ranks(verdicts_rank, 2, folder)


def test_names_that_only_some_processes_have(verdicts) -> None:
    folder, (first, second) = verdicts
    assert first["misfits"] == second["misfits"]
    at, other = folder / "misfits/step-000001", "it was saved from another model"
    assert first["misfits"] == [
        f"{at} lacks new; {other} or method",
        f"{at}: model/norm.weight has shape (7,), this run needs (8,); {other}",
        f"{at}: model/norm.weight has dtype torch.float32, this run needs torch.float64; it was "
        "saved with another optim.name or model.dtype",
        f"{at} holds model/norm.weight too; {other} or method",
        "model/embed.weight: its chunks do not cover (131, 6) exactly once",
    ]


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_one_rank_cannot_write(verdicts, bad_rank: int) -> None:
    folder, (first, second) = verdicts
    key = f"disk{bad_rank}"
    assert first[key] == second[key]
    assert f"No space left on device in {folder / key} (rank {bad_rank})" in first[key]


def test_a_folder_that_is_not_shared_is_said(verdicts) -> None:
    folder, (first, second) = verdicts
    assert "no file of rank 1 came within 0.5 s" in first["apart"]
    assert "that all nodes share" in first["apart"]
    assert "rank 1" in second["apart"]
    assert store.steps(folder / "apart") == []


def test_plain_tensors_must_be_the_same_everywhere(verdicts) -> None:
    _, (first, second) = verdicts
    assert first["unequal"] == second["unequal"]
    assert "do not hold the same plain tensors" in first["unequal"]


def test_damage_seen_by_one_rank_sends_all_to_the_older_one(verdicts) -> None:
    _, ranks = verdicts
    assert all("step-000008 is passed over" in rank["damaged"] for rank in ranks)
    assert any("rank-00001.safetensors is damaged" in rank["damaged"] for rank in ranks)
