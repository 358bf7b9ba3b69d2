"""What the machine and whoever started this process say: ranks, GPUs, cores, addresses. Imports no torch."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from megatune.errors import ParallelError

_GPU_FOLDER = Path("/proc/driver/nvidia/gpus")
_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
# Ports that other programs seldom use and the kernel does not hand out by itself (32768 and up).
_FIRST_PORT, _PORTS = 20000, 12000


def already_launched(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, srun or mpirun started this process as a rank: one of several, or torchrun's or mpirun's only
    one (srun's only one is an agent, or a shell in which a person works)."""
    return ("RANK" in environ and "WORLD_SIZE" in environ) or bool(rank_variables(environ, host="?"))


def started_by_mpirun(environ: Mapping[str, str] = os.environ) -> str:
    """`openmpi`, or `hydra` (MPICH, Intel MPI, MVAPICH), where that MPI's mpirun started this process, else empty.

    Also where mpirun starts its own daemons through srun, whose variables their ranks inherit; srun's tasks may
    have PMI variables, too, which then say the same as srun's.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return ""
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return "openmpi"
    if "PMI_SIZE" not in environ or "PMI_RANK" not in environ:
        return ""
    srun = environ.get("SLURM_STEP_NUM_TASKS"), environ.get("SLURM_PROCID")
    says_the_same = srun == (environ["PMI_SIZE"], environ["PMI_RANK"])
    return "hydra" if "MPI_LOCALNRANKS" in environ or not says_the_same else ""


def rank_variables(environ: Mapping[str, str] = os.environ, host: str = "") -> dict[str, str]:
    """torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) out of srun's
    or mpirun's; empty where they are set already or where this process was started alone.

    `host`: of rank 0, for mpirun over several machines where MASTER_ADDR is not set. Raises ParallelError where
    neither is known.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return {}
    family = started_by_mpirun(environ)
    if family == "openmpi":
        rank, size = environ["OMPI_COMM_WORLD_RANK"], environ["OMPI_COMM_WORLD_SIZE"]
        local, local_size = environ["OMPI_COMM_WORLD_LOCAL_RANK"], environ["OMPI_COMM_WORLD_LOCAL_SIZE"]
        host, seed = _mpi_host(environ, size, local_size, host), os.getppid()
    elif family == "hydra":
        rank, size = environ["PMI_RANK"], environ["PMI_SIZE"]
        local, local_size = environ.get("MPI_LOCALRANKID", rank), environ.get("MPI_LOCALNRANKS", size)
        host, seed = _mpi_host(environ, size, local_size, host), os.getppid()
    elif int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        rank, size, local = environ["SLURM_PROCID"], environ["SLURM_STEP_NUM_TASKS"], environ["SLURM_LOCALID"]
        local_size = _slurm_tasks_here(environ)
        host = _first_host(environ["SLURM_STEP_NODELIST"])
        # Two steps of one job, and two jobs, do not meet each other.
        seed = int(environ.get("SLURM_JOB_ID", 0)) + 997 * _step_number(environ)
    else:
        return {}
    found = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": local_size}
    found["MASTER_ADDR"] = environ.get("MASTER_ADDR", host)
    found["MASTER_PORT"] = environ.get("MASTER_PORT", str(_FIRST_PORT + seed % _PORTS))
    return found


def rank_here(environ: Mapping[str, str] = os.environ) -> int:
    """This process's rank, 0 where it was started alone."""
    return int(environ.get("RANK") or rank_variables(environ, host="?").get("RANK", 0))


def _step_number(environ: Mapping[str, str]) -> int:
    step = environ.get("SLURM_STEP_ID", "0")
    return int(step) if step.isdecimal() else 0


def _mpi_host(environ: Mapping[str, str], size: str, local_size: str, host: str) -> str:
    if size == local_size:
        return "127.0.0.1"
    if "MASTER_ADDR" not in environ and not host:
        raise ParallelError(
            f"mpirun started {size} ranks on several machines and nothing says where rank 0 is: install mpi4py for "
            f"this MPI (pip install mpi4py), or pass -x MASTER_ADDR=<host of rank 0> -x MASTER_PORT=<a free port> "
            f"(-genv NAME VALUE under MPICH and Intel MPI)"
        )
    return environ.get("MASTER_ADDR", host)


def _first_host(node_list: str) -> str:
    """The first of Slurm's compressed list: `gpu[007-009,012],login` -> `gpu007`."""
    match = re.match(r"([^\[,]*)(?:\[(\d+)[^\]]*\])?([^\[,]*)", node_list)
    return "".join(part or "" for part in match.groups())


def _slurm_tasks_here(environ: Mapping[str, str]) -> str:
    """This node's entry of, for example, `4(x2),3`."""
    counts: list[str] = []
    for item in environ.get("SLURM_STEP_TASKS_PER_NODE", environ["SLURM_STEP_NUM_TASKS"]).split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        counts += [match[1]] * int(match[2] or 1)
    return counts[int(environ.get("SLURM_NODEID", 0))]


def gpu_count(environ: Mapping[str, str] = os.environ) -> int:
    """NVIDIA GPUs that a process started here would see, without loading CUDA (0.1 s against seconds)."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not visible.strip():
        return 0
    physical = _physical_gpus()
    if visible is None:
        return physical
    count = 0
    for item in visible.split(","):  # CUDA takes the devices before the first one that does not exist
        item = item.strip()
        is_index = item.isdecimal() and int(item) < physical
        if not (is_index or (physical and item.startswith(("GPU-", "MIG-")))):
            break
        count += 1
    return count


def _physical_gpus() -> int:
    tool = shutil.which("nvidia-smi")
    if tool:
        try:
            listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30, check=False)
            if listed.returncode == 0:
                return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
        except (OSError, subprocess.TimeoutExpired):
            return _driver_gpus()
    return _driver_gpus()


def _driver_gpus() -> int:
    return len(list(_GPU_FOLDER.iterdir())) if _GPU_FOLDER.is_dir() else 0


def usable_cores() -> int:
    """Cores that this process may use: its CPU mask and its container's limit."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = _CPU_LIMIT.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))


def local_addresses() -> list[str]:
    """This machine's IPv4 addresses but the loopback's, those of bridges that containers make on each machine last."""
    import psutil

    found = [
        (name.startswith(("docker", "br-", "virbr", "veth", "cni", "podman")), one.address)
        for name, addresses in psutil.net_if_addrs().items()
        for one in addresses
        if one.family == socket.AF_INET and not one.address.startswith("127.")
    ]
    return [address for _, address in sorted(found, key=lambda item: item[0])]
