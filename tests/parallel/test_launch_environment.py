"""Who started this process, and on what machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from megatune.errors import ParallelError
from megatune.launch import environment
from megatune.launch.environment import (
    already_launched,
    gpu_count,
    local_addresses,
    rank_here,
    rank_variables,
    started_by_mpirun,
    usable_cores,
)

ROOT = Path(__file__).parents[2]
SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_STEP_NODELIST": "gpu[007-009]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def test_started_alone() -> None:
    # In a batch script or a salloc shell Slurm's variables are set, too, but there is no step of several tasks.
    for environ in (
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},
        {"SLURM_STEP_NUM_TASKS": "1"},
    ):
        assert not already_launched(environ)
        assert rank_variables(environ) == {}


def test_started_by_torchrun() -> None:
    environ = {"RANK": "0", "WORLD_SIZE": "1", **SRUN}
    assert already_launched(environ)
    assert rank_variables(environ) == {}


def test_started_by_srun() -> None:
    assert already_launched(SRUN)
    assert rank_variables(SRUN) == {
        "RANK": "6",
        "WORLD_SIZE": "11",
        "LOCAL_RANK": "2",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": str(20000 + 123456 % 12000),
    }
    last_node = {**SRUN, "SLURM_NODEID": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}
    assert rank_variables(last_node)["LOCAL_WORLD_SIZE"] == "3"
    assert rank_variables(last_node)["MASTER_ADDR"] == "10.0.0.1"
    assert rank_variables(last_node)["MASTER_PORT"] == "29501"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu007", "gpu007"),
        ("gpu[007-009,012],login1", "gpu007"),
        ("login1,gpu[1-4]", "login1"),
        ("rack[3,5]-node", "rack3-node"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert rank_variables({**SRUN, "SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


def test_two_steps_of_a_job_have_two_ports() -> None:
    ports = {rank_variables({**SRUN, "SLURM_STEP_ID": step})["MASTER_PORT"] for step in ("0", "1", "2")}
    assert len(ports) == 3
    assert all(20000 <= int(port) < 32000 for port in ports)


def test_started_by_open_mpi() -> None:
    assert started_by_mpirun(OPEN_MPI) == "openmpi"
    with pytest.raises(ParallelError, match="nothing says where rank 0 is: install mpi4py"):
        rank_variables(OPEN_MPI)
    found = rank_variables({**OPEN_MPI, "MASTER_ADDR": "node1", "MASTER_PORT": "1234"})
    assert found == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "1234",
    }
    one_machine = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}
    assert rank_variables(one_machine)["MASTER_ADDR"] == "127.0.0.1"
    # Inside a Slurm job mpirun starts its daemons with srun, and the ranks inherit a daemon's variables.
    assert rank_variables({**SRUN, **one_machine})["RANK"] == "3"
    alone = {name: value for name, value in one_machine.items() if "LOCAL" in name or "RANK" in name}
    alone |= {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    assert already_launched(alone)  # mpirun -n 1 means one rank


def test_started_by_hydra() -> None:
    mpich = {"PMI_RANK": "1", "PMI_SIZE": "2"}
    assert started_by_mpirun(mpich) == "hydra"
    assert already_launched(mpich)
    assert rank_variables(mpich)["LOCAL_RANK"] == "1"
    assert rank_variables(mpich)["WORLD_SIZE"] == rank_variables(mpich)["LOCAL_WORLD_SIZE"] == "2"
    intel = {"PMI_RANK": "9", "PMI_SIZE": "16", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "8"}
    with pytest.raises(ParallelError, match="nothing says where rank 0 is"):
        rank_variables(intel)
    assert already_launched(intel)
    assert rank_here(intel) == 9
    found = rank_variables({**intel, "MASTER_ADDR": "10.0.0.1"})
    assert (found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"], found["MASTER_ADDR"]) == ("1", "8", "10.0.0.1")
    daemon = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}  # of hydra, which srun started
    assert started_by_mpirun({**daemon, **intel}) == "hydra"
    one_a_node = {**daemon, **intel, "PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "1"}
    assert started_by_mpirun(one_a_node) == "hydra"


def test_sruns_tasks_with_pmi_are_sruns() -> None:
    pmi = {**SRUN, "PMI_RANK": SRUN["SLURM_PROCID"], "PMI_SIZE": SRUN["SLURM_STEP_NUM_TASKS"]}
    assert started_by_mpirun(pmi) == ""
    assert rank_variables(pmi) == rank_variables(SRUN)
    one_task = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "PMI_RANK": "0", "PMI_SIZE": "1"}
    assert not already_launched(one_task)  # a shell under `srun --pty`: all GPUs are its own
    assert started_by_mpirun({"RANK": "0", "WORLD_SIZE": "2", **OPEN_MPI}) == ""
    assert rank_here({}) == 0
    assert rank_here(SRUN) == 6


def test_addresses_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(address: str) -> SimpleNamespace:
        return SimpleNamespace(family=socket.AF_INET, address=address)

    found = {"docker0": "172.17.0.1", "lo": "127.0.0.1", "eth0": "10.0.0.1", "ib0": "10.1.0.1"}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {name: [entry(one)] for name, one in found.items()})
    assert local_addresses() == ["10.0.0.1", "10.1.0.1", "172.17.0.1"]


def test_a_mistake_of_all_ranks_is_left_to_rank_0(tmp_path: Path) -> None:
    """srun and torchrun end the others when rank 0 has ended: these wait for that before they say the same."""
    config = tmp_path / "run.yaml"
    config.write_text("model: {path: x}\ndata: {train: none.jsonl}\ncheckpoint: {folder: x}\n")
    began = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "megatune", "train", str(config)],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        for rank in range(2)
    ]
    said = ranks[0].communicate(timeout=60)[1]
    assert said.startswith("megatune: data.train: none.jsonl does not exist")
    assert ranks[0].returncode == 2
    assert ranks[1].communicate(timeout=60)[1] == said
    assert time.monotonic() - began > 2.0


STUB = """#!/usr/bin/env bash
printf '%s\\n' "$0" "$@"
"""


@pytest.mark.parametrize(
    ("script", "words", "variables", "expected"),
    [
        (
            "torchrun.sh",
            ["a b.yaml", "x=$(y)"],
            {},
            "python -m torch.distributed.run --nnodes=1 --nproc-per-node=auto --standalone -m megatune train",
        ),
        (
            "torchrun.sh",
            ["a b.yaml", "x=$(y)"],
            {"NNODES": "2", "MASTER_ADDR": "node1", "NPROC_PER_NODE": "4"},
            "python -m torch.distributed.run --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-id=megatune "
            "--rdzv-endpoint=node1:29500 -m megatune train",
        ),
        ("mpirun.sh", ["8", "a b.yaml", "x=$(y)"], {"MPI": "HYDRA"}, "mpirun -n 8 {} -m megatune train"),
        (
            "mpirun.sh",
            ["16", "a b.yaml", "x=$(y)"],
            {"MPI": "HYDRA", "HOSTS": "node1:8,node2:8", "MPIRUN_ARGS": "-v -l"},
            "mpirun -n 16 -hosts node1:8,node2:8 -v -l {} -m megatune train",
        ),
        (
            "mpirun.sh",
            ["16", "a b.yaml", "x=$(y)"],
            {"MPI": "(Open MPI) 4.1", "HOSTS": "node1:8,node2:8"},
            "mpirun -n 16 --bind-to none -x OMP_NUM_THREADS --host node1:8,node2:8 {} -m megatune train",
        ),
    ],
)
def test_what_the_scripts_start(
    tmp_path: Path, script: str, words: list[str], variables: dict[str, str], expected: str
) -> None:
    for name in ("python", "mpirun"):
        stub = tmp_path / name
        stub.write_text(STUB.replace("printf", '[[ $1 == --version ]] && echo "$MPI" && exit\nprintf', 1))
        stub.chmod(0o755)
    environment = {**os.environ, **variables, "PYTHON": str(tmp_path / "python")}
    run = subprocess.run([ROOT / "launch" / script, *words], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    program, *found = run.stdout.splitlines()
    wanted = [word.format(tmp_path / "python") for word in expected.split()]
    assert [Path(program).name, *found] == [*wanted, "a b.yaml", "x=$(y)"]


@pytest.mark.parametrize("script", ["torchrun.sh", "mpirun.sh"])
def test_the_scripts_say_how_they_are_used(script: str) -> None:
    run = subprocess.run([ROOT / "launch" / script], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("usage: ")


@pytest.fixture
def four_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose nvidia-smi lists four GPUs, one of them cut in two."""
    tool = tmp_path / "nvidia-smi"
    lines = [f"GPU {i}: NVIDIA H100 80GB HBM3 (UUID: GPU-{i})" for i in range(4)]
    lines.insert(1, "  MIG 3g.40gb Device 0: (UUID: MIG-a)")
    tool.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + "\nEND\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tool


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 4),
        ("", 0),
        (" ", 0),
        ("-1", 0),
        ("0", 1),
        ("1,3", 2),
        ("1, 2,9,3", 2),  # CUDA ignores what stands behind a device that does not exist
        ("GPU-2,GPU-3", 2),
        ("MIG-a", 1),
        ("NoDevFiles", 0),
    ],
)
def test_visible_gpus(four_gpus: Path, visible: str | None, count: int) -> None:
    assert gpu_count({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == count


def test_gpus_without_the_tool(four_gpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    four_gpus.write_text("#!/bin/sh\nexit 9\n")  # the driver cannot be reached
    monkeypatch.setattr(environment, "_GPU_FOLDER", tmp_path / "gpus")
    assert gpu_count({}) == 0
    assert gpu_count({"CUDA_VISIBLE_DEVICES": "0,1"}) == 0
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
    assert gpu_count({}) == 2
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert gpu_count({}) == 2


def test_cores_respect_a_containers_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = len(os.sched_getaffinity(0))
    limit = tmp_path / "cpu.max"
    monkeypatch.setattr(environment, "_CPU_LIMIT", limit)
    assert usable_cores() == mask
    for text, cores in (
        ("max 100000", mask),
        ("100000 100000", 1),
        ("50000 100000", 1),
        ("9900000 100000", mask),
    ):
        limit.write_text(text + "\n")
        assert usable_cores() == cores
