"""`megatune env`: versions, devices, compiled parts, and which body serves each op."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table


def show_environment() -> None:
    """Print versions, devices, which binaries are there, and the body of each op on each kind of device here."""
    import torch

    from megatune import __version__, ops
    from megatune.ops import _load

    table = Table("what", "value", title="megatune environment")
    table.add_row("megatune", __version__)
    table.add_row("python", f"{platform.python_version()} ({sys.executable})")
    table.add_row("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})")
    for name, version in nvidia_versions():
        table.add_row(name, version)
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        table.add_row(f"GPU {index}", f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    amx = "yes" if torch.cpu._is_amx_tile_supported() else "no"
    table.add_row("CPU", f"{os.cpu_count()} cores, AMX {amx}")
    table.add_row("_pack", _pack())
    for name, problem in (("_cpu.so", _load.cpu_problem()), ("_cuda.so", _load.cuda_problem())):
        table.add_row(name, "loaded" if problem is None else f"not used: {problem}")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        ops.configure({}, device)
        for op, body, others in ops.table(device):
            label = f"{op} on {device}" if len(devices) > 1 else f"op {op}"
            more = f"; also there: {others}" if others else ""
            table.add_row(label, f"{body}: {ops.why(op, device)}{more}")
    Console().print(table)


def _pack() -> str:
    if find_spec("megatune._pack"):
        return "there"
    others = sorted(path.name for path in Path(__file__).parents[1].glob("_pack.*.so"))
    reason = f"built for another Python ({others[0]})" if others else "not built"
    return f"{reason}: Python packs samples, slower"


def nvidia_versions() -> list[tuple[str, str]]:
    """(what, version) of cuDNN, NCCL and the driver, of those that are here."""
    import torch

    versions = []
    if torch.version.cuda is not None and torch.backends.cudnn.is_available():
        versions.append(("cuDNN", str(torch.backends.cudnn.version())))
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        versions.append(("NCCL", ".".join(map(str, torch.cuda.nccl.version()))))
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True)
        versions += [("NVIDIA driver", line.strip()) for line in done.stdout.splitlines()[:1]]
    return versions
