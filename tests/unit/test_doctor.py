"""`megatune doctor`: what it makes of facts, what it measures, and each failure injected."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatune.config.schema import Config
from megatune.launch import doctor, doctor_net, doctor_probe
from megatune.launch.doctor_checks import (
    GIB,
    NO_GO,
    NOTE,
    OK,
    WARNING,
    Facts,
    Finding,
    Gpu,
    Needs,
    Node,
    Pair,
    Storage,
    is_go,
    judge,
)
from tests.helpers.dist import RankError, run_ranks
from tests.helpers.runs import LORA, tiny_config

VERSIONS = {
    "megatune": "0.1",
    "torch": "2.13",
    "python": "3.12.1",
    "cuda": "12.8",
    "nccl": "2.27",
    "driver": "570",
}
H100 = Gpu("H100", 80 * GIB, 80 * GIB, 0)


def node(host: str = "a", **changes: Any) -> Node:
    """A healthy machine with 8 GPUs."""
    good = Node(host, 8, 64, 512 * GIB, VERSIONS, (H100,) * 8, 8, (12, 8), 65536, -1, 64 * GIB, 8, "10.0.0.1")
    return replace(good, **changes)


def facts(*nodes: Node, **changes: Any) -> Facts:
    nodes = nodes or (node("a"), node("b"))
    pairs = [Pair(a.host, b.host, 40e9) for a, b in combinations(nodes, 2)]
    clocks = {one.host: 0.001 for one in nodes}
    storage = [Storage(one.host, "", 64 * 2**20, 0.05, 0.002, 0.0) for one in nodes]
    rates = {f"{one.host}, GPU {number}": 700e12 for one in nodes for number in range(8)}
    good = Facts(list(nodes), pairs, clocks, storage, rates, "/scratch/run", 900 * GIB)
    good.needs = Needs(16, 100 * GIB, 300 * GIB, 60 * GIB)
    return replace(good, **changes)


def said(found: Facts, level: str = NO_GO) -> list[str]:
    return [f"{one.check}: {one.text}" for one in judge(found) if one.level == level]


def only(found: Facts, level: str = NO_GO) -> str:
    """The one reason; whether it goes follows from the level."""
    (reason,) = said(found, level)
    assert is_go(judge(found)) == (level != NO_GO)
    return reason


def test_healthy_nodes_go() -> None:
    findings = judge(facts())
    assert {one.level for one in findings} == {OK}
    assert is_go(findings)
    checks = ["versions", "GPUs", "speed", "limits", "clocks", "network", "memory", "storage", "space"]
    assert [one.check for one in findings] == checks
    text = {one.check: one.text for one in findings}
    assert text["storage"].startswith("checkpoint.folder /scratch/run: 2.7 GB/s from 2 nodes at once")
    assert "a checkpoint of 100.0 GiB takes about 40.0 s" in text["storage"]
    assert text["space"].endswith("900.0 GiB free, checkpoints and exports need 330.0 GiB")


@pytest.mark.parametrize("name", VERSIONS)
def test_versions_that_differ_are_named_with_their_nodes(name: str) -> None:
    other = {**VERSIONS, name: "12.9.9"}
    found = facts(node("a"), node("b"), node("c", versions=other, driver_cuda=(13, 0)))
    assert only(found).startswith(f"versions: {name} differs: {VERSIONS[name]} on a, b; 12.9.9 on c.")


@pytest.mark.parametrize(
    ("changes", "level", "reason"),
    [
        (
            {"driver_cuda": (11, 8)},
            NO_GO,
            "GPUs: b: torch is built for CUDA 12.8, the driver serves CUDA 11.8",
        ),
        ({"driver_cuda": (12, 2)}, NOTE, "GPUs: b: torch is built for CUDA 12.8, the driver for 12.2"),
        ({"torch_gpus": 7}, NO_GO, "GPUs: b: torch sees 7 of 8 GPUs"),
        ({"ranks": 9}, NO_GO, "GPUs: b runs 9 ranks on 8 GPUs"),
        (
            {"gpus": (H100,) * 7, "torch_gpus": 7, "ranks": 7},
            WARNING,
            "GPUs: 8 x H100 on a; 7 x H100 on b (they differ)",
        ),
        (
            {"gpus": (*(H100,) * 7, replace(H100, errors=3))},
            NO_GO,
            "GPUs: b: GPU 7 has 3 uncorrected memory errors",
        ),
        (
            {"gpus": (*(H100,) * 7, replace(H100, free=60 * GIB))},
            WARNING,
            "GPUs: b: GPU 7 has 20.0 GiB in use by others",
        ),
        ({"open_files": 1000}, NO_GO, "limits: b: a process may open 1000 files"),
        ({"open_files": 2048}, WARNING, "limits: b: a process may open 2048 files"),
        (
            {"locked_memory": 8 * 2**20},
            NO_GO,
            "limits: b: InfiniBand needs locked memory, the limit is 8 MiB",
        ),
        ({"shared_memory": 64 * 2**20}, NO_GO, "limits: b: /dev/shm has 64 MiB"),
        ({"own_address": "127.0.1.1"}, WARNING, "network: the name of b is a loopback address there"),
        (
            {"mistakes": ("data.train: x.jsonl does not exist",)},
            NO_GO,
            "config: data.train: x.jsonl does not exist (on b)",
        ),
    ],
)
def test_a_node_that_is_not_well(changes: dict[str, Any], level: str, reason: str) -> None:
    assert only(facts(node("a"), node("b", **changes)), level).startswith(reason)


def test_torch_without_cuda_on_a_machine_with_gpus() -> None:
    versions = {**VERSIONS, "cuda": "", "nccl": ""}
    found = facts(node("a", versions=versions, torch_gpus=0))
    assert only(found).startswith("GPUs: a has 8 GPUs, but torch is a build for CPUs")


@pytest.mark.parametrize(("seconds", "level"), [(0.3, WARNING), (-7.2, NO_GO), (0.01, None)])
def test_a_clock_that_is_off(seconds: float, level: str | None) -> None:
    found = facts(clocks={"a": 0.0, "b": seconds})
    if level is None:
        assert {one.level for one in judge(found)} == {OK}
        return
    way = "ahead of" if seconds > 0 else "behind"
    assert only(found, level).startswith(f"clocks: b is {abs(seconds):.1f} s {way} the first node: start NTP")


@pytest.mark.parametrize("count", range(1, 18))
def test_a_tournament_has_each_pair_once_in_the_fewest_rounds(count: int) -> None:
    found = doctor_net.rounds(count)
    assert sorted(pair for pairs in found for pair in pairs) == list(combinations(range(count), 2))
    assert len(found) == (count - 1 + count % 2 if count > 1 else 0)
    for pairs in found:
        players = [player for pair in pairs for player in pair]
        assert len(players) == len(set(players)) == count - count % 2


def test_slow_pairs_and_the_node_behind_them_are_named() -> None:
    nodes = [node(name) for name in "abcd"]
    speed = dict.fromkeys(combinations("abcd", 2), 40e9)

    def found(**slow: float) -> Facts:
        pairs = [Pair(a, b, slow.get(a + b, value)) for (a, b), value in speed.items()]
        return facts(*nodes, pairs=pairs)

    assert only(found(bc=10e9)) == "network: b - c: 10.0 GB/s, the median is 40.0 GB/s"
    assert only(found(bc=30e9), WARNING) == "network: b - c: 30.0 GB/s, the median is 40.0 GB/s"
    reasons = said(found(ac=9e9, bc=0.05e9, cd=10e9))
    assert len(reasons) == 4
    assert "network: b - c: 50 MB/s, the median is 25.0 GB/s" in reasons
    assert reasons[-1] == "network: c is slow with every other node: leave it out"
    broken = facts(*nodes, pairs=[Pair("a", "b", problem="timed out"), Pair("a", "c", 40e9)])
    assert only(broken) == "network: a - b: all-reduce failed: timed out"


def test_a_slow_gpu_is_named() -> None:
    rates = {"a, GPU 0": 700e12, "a, GPU 1": 690e12, "b, GPU 0": 300e12}
    assert only(facts(rates=rates)).startswith("speed: b, GPU 0 computes 300 TFLOP/s, the median is 690")
    assert only(facts(rates={**rates, "b, GPU 0": 500e12}), WARNING).startswith(
        "speed: b, GPU 0 computes 500"
    )


@pytest.mark.parametrize(
    ("storage", "level", "reason"),
    [
        (Storage("b", "Read-only file system"), NO_GO, "/scratch/run, on b: Read-only file system"),
        (Storage("b", seen=None), NO_GO, "/scratch/run: b does not see what the first node wrote"),
        (Storage("b", "", 2**26, 0.05, 0.002, 3.0), WARNING, "/scratch/run: b saw a new file after 3.0 s"),
        (Storage("b", "", 2**26, 9.0, 0.002, 0.0), WARNING, "/scratch/run: 15 MB/s from 2 nodes at once"),
        (Storage("b", "", 2**26, 0.05, 0.8, 0.0), WARNING, "/scratch/run: 2.7 GB/s from 2 nodes at once"),
    ],
)
def test_storage_that_does_not_do(storage: Storage, level: str, reason: str) -> None:
    found = facts(storage=[Storage("a", "", 2**26, 0.05, 0.002, 0.0), storage])
    assert only(found, level).startswith(f"storage: checkpoint.folder {reason}")


def test_too_little_space_and_memory() -> None:
    assert only(facts(free=320 * GIB)).startswith(
        "space: /scratch/run: 320.0 GiB free, checkpoints and exports need 330"
    )
    needs = Needs(16, GIB, GIB, 75 * GIB)
    assert only(facts(needs=needs)).startswith(
        "memory: a process needs about 82.5 GiB (estimate), the smallest GPU has 80.0 GiB"
    )
    hosts = [node(name, gpus=(), torch_gpus=0, memory=64 * GIB) for name in "ab"]
    needs = Needs(8, GIB, GIB, 20 * GIB)
    assert "a process's share of the host is 16.0 GiB" in only(facts(*hosts, needs=needs, rates={}))
    assert (
        only(facts(needs=None, mistakes=["parallel: 3 does not divide"]))
        == "config: parallel: 3 does not divide"
    )


def test_what_nvidia_smi_says_is_read() -> None:
    text = "NVIDIA H100 80GB HBM3, 570.86.15, 81559, 81000, 0\nNVIDIA A10, 570.86.15, 23028, 22500, [N/A]\n"
    driver, gpus = doctor_probe.read_gpus(text + "No devices were found\n")
    assert driver == "570.86.15"
    assert gpus[0] == Gpu("NVIDIA H100 80GB HBM3", 81559 * 2**20, 81000 * 2**20, 0)
    assert gpus[1].errors is None
    assert doctor_probe.read_gpus("") == ("", [])
    assert doctor_probe.shown(gpus, None) == gpus
    assert doctor_probe.shown(gpus, "1") == [gpus[1]]
    assert doctor_probe.shown(gpus, "1, 0,7") == [gpus[1], gpus[0]]
    assert doctor_probe.shown(gpus, "GPU-123") == [gpus[0]]


def test_the_run_folder_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_probe, "_WRITTEN", doctor_probe._BLOCK)
    folder = doctor_probe.RunFolder(str(tmp_path / "new" / "run"), "1")
    assert folder.open() == ""
    found = folder.measure("a")
    assert (found.problem, found.written) == ("", doctor_probe._BLOCK)
    assert found.seconds > 0
    assert found.sync > 0
    folder.close()
    assert list(tmp_path.iterdir()) == []
    kept = tmp_path / "kept"
    kept.mkdir()
    folder = doctor_probe.RunFolder(str(kept), "2")
    folder.open()
    folder.close()
    assert list(kept.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert "cannot be written (Not a directory)" in doctor_probe.RunFolder(str(tmp_path / "file"), "3").open()


def test_a_folder_of_another_machine_is_not_seen(tmp_path: Path) -> None:
    folder = doctor_probe.RunFolder(str(tmp_path), "1")
    assert folder.measure("b", wait=0.2).seen is None
    folder.probe.mkdir()
    (folder.probe / "token").write_text("another start's")
    assert folder.measure("b", wait=0.2).seen is None


def test_a_rename_that_leaves_the_old_name_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = doctor_probe.RunFolder(str(tmp_path), "1")
    assert folder.open() == ""
    monkeypatch.setattr(doctor_probe, "_WRITTEN", doctor_probe._BLOCK)
    monkeypatch.setattr(os, "rename", lambda old, new: shutil.copytree(old, new))
    assert "rename is not atomic" in folder.measure("a").problem
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", no_space)
    assert folder.measure("c").problem.startswith("No space left on device")


def no_space(_file: int) -> None:
    raise OSError(28, "No space left on device")


def test_what_a_run_takes(tiny_llama: Path, tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    one = 12 * 123_072  # all parameters of the tiny model: weights and two moments in fp32
    cpu = torch.device("cpu")
    config = tiny_config(tiny_llama, tiny_data, tmp_path / "run", checkpoint__every=1)
    needs = doctor_probe.needs_of(config, 2, cpu)
    assert needs.checkpoint == pytest.approx(one, rel=0.2)
    assert needs.disk == pytest.approx(3 * needs.checkpoint + needs.checkpoint / 3, rel=0.01)
    assert needs.process > 0
    (tmp_path / "run" / "checkpoints" / "step-000001").mkdir(parents=True)
    assert doctor_probe.needs_of(config, 2, cpu).disk == needs.disk - needs.checkpoint
    for name, width in (("lion", 8), ("adamw_bf16", 10)):
        other = tiny_config(
            tiny_llama, tiny_data, tmp_path / name, optim__name=name, model__dtype="bf16", checkpoint__every=1
        )
        share = doctor_probe.needs_of(other, 2, cpu).checkpoint / needs.checkpoint
        assert share == pytest.approx(width / 12, rel=0.01)
    lora = tiny_config(tiny_llama, tiny_data, tmp_path / "lora", method=LORA)
    assert doctor_probe.needs_of(lora, 2, cpu).checkpoint < needs.checkpoint / 4


# On real ranks.


def slow_with_node2(data: torch.Tensor, group: Any = None) -> None:
    dist.all_reduce(data, group=group)
    if set(dist.get_process_group_ranks(group)) == {1, 2}:
        time.sleep(0.3)


def look(rank: int, world_size: int, config: Config) -> tuple[Facts, int, list[Finding]]:
    """Three ranks as three machines; the clock of the last is ahead, its line to the second slow, the disk full."""
    clock = (lambda: time.time() + 7.0) if rank == 2 else time.time
    doctor_net._BYTES["cpu"] = 2**20
    doctor_probe._WRITTEN = doctor_probe._BLOCK
    found = doctor.examine(
        config,
        torch.device("cpu"),
        host=f"node{rank}",
        clock=clock,
        all_reduce=slow_with_node2,
        free=lambda: 1000,
    )
    again = doctor.examine(None, torch.device("cpu"), host="one")
    return found, len(again.pairs), judge(again)


def test_three_ranks_as_three_nodes(tiny_llama: Path, tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    config = tiny_config(tiny_llama, tiny_data, tmp_path / "run", train__global_batch_size=3)
    (found, pairs, again), *_ = run_ranks(look, 3, config)
    assert [node.host for node in found.nodes] == ["node0", "node1", "node2"]
    assert sorted((pair.a, pair.b) for pair in found.pairs) == list(
        combinations(["node0", "node1", "node2"], 2)
    )
    assert all(pair.speed > 0 for pair in found.pairs)
    assert found.clocks["node2"] == pytest.approx(7.0, abs=0.2)
    assert found.clocks["node1"] == pytest.approx(0.0, abs=0.2)
    assert all(one.seen is not None and not one.problem for one in found.storage)
    assert found.needs.processes == 3
    reasons = said(found)
    assert any(reason.startswith("network: node1 - node2: ") for reason in reasons)
    assert any(reason.startswith("clocks: node2 is 7.0 s ahead") for reason in reasons)
    assert any(reason.startswith(f"space: {tmp_path / 'run'}: 0.0 MiB free") for reason in reasons)
    assert not (tmp_path / "run").exists()
    assert pairs == 1  # within the one node
    assert is_go(again)


def come(rank: int, world_size: int) -> str:
    if rank == 2:
        return "stays away"
    doctor_net.meet(torch.device("cpu"), 1.0)
    return "met"


def test_ranks_that_do_not_come_are_named() -> None:
    with pytest.raises(RankError, match="of 3 ranks these did not come within 1 s: 2; see their nodes"):
        run_ranks(come, 3, init=False)


def test_the_verb(
    tiny_llama: Path, tiny_data: tuple[Path, Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    from click.testing import CliRunner

    from megatune.cli import commands
    from megatune.config.loader import dump_config

    monkeypatch.setattr(doctor_probe, "_WRITTEN", doctor_probe._BLOCK)
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(tiny_config(tiny_llama, tiny_data, tmp_path / "run", launch={"nproc": 1})))
    good = CliRunner().invoke(commands, ["doctor", str(path)])
    assert good.exit_code == 0, good.output
    assert good.stdout.splitlines()[-1] == "go (1 rank on 1 node)"
    (tmp_path / "taken").write_text("")
    bad = CliRunner().invoke(
        commands,
        [
            "doctor",
            str(path),
            "checkpoint.folder=" + str(tmp_path / "taken" / "run"),
            "data.train=none.jsonl",
        ],
    )
    assert bad.exit_code == 2
    assert "no go (1 rank on 1 node); to be mended:" in bad.stdout
    assert "storage: checkpoint.folder" in bad.stdout
    assert "config: data.train: none.jsonl does not exist" in bad.stdout
    as_json = json.loads(CliRunner().invoke(commands, ["doctor", "--json"]).stdout)
    assert as_json["go"] is True
    assert as_json["facts"]["nodes"][0]["versions"]["torch"] == torch.__version__
