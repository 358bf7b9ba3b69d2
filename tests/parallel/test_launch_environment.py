"""Who started this process, and on what machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatune.errors import ParallelError
from megatune.launch import environment
from megatune.launch.environment import already_launched, gpu_count, rank_variables, usable_cores

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


def test_started_by_mpirun() -> None:
    with pytest.raises(ParallelError, match="MASTER_ADDR is not set; pass -x MASTER_ADDR"):
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
    mpich = {"PMI_RANK": "1", "PMI_SIZE": "2"}
    assert already_launched(mpich)
    assert rank_variables(mpich)["LOCAL_RANK"] == "1"
    assert rank_variables(mpich)["WORLD_SIZE"] == rank_variables(mpich)["LOCAL_WORLD_SIZE"] == "2"


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
