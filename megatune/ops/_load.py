"""Finds and loads the compiled CPU kernels (_cpu.so), or says why the references run instead."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import torch

CPU_ABI = "2"
TORCH_NEEDED = (2, 11)  # what _cpu.so is compiled for (setup.py); later versions run it too
ISA_NAMES = ("plain", "avx2", "avx512")


@cache
def cpu_problem() -> str | None:
    """Loads _cpu.so on the first call. None: its kernels can be used; else why not.

    A file made for another version is not loaded; that gives one warning.
    """
    path = Path(__file__).with_name("_cpu.so")
    if not path.exists():
        return "megatune/ops/_cpu.so is not built (pip install --no-build-isolation -e . builds it)"
    problem = _misfit(path)
    if problem is None:
        try:
            torch.ops.load_library(str(path))
            return None
        except OSError as error:
            problem = f"it cannot be loaded ({error})"
    problem = f"{path} is not used: {problem}; build it again with pip install --no-build-isolation -e ."
    warnings.warn(problem, stacklevel=2)
    return problem


def _misfit(path: Path) -> str | None:
    """Why a library must not even be opened; it says in plain text what it was made for."""
    if f"megatune-cpu-abi={CPU_ABI};".encode() not in path.read_bytes():
        return "it was built from another version of megatune"
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < TORCH_NEEDED:
        return f"it needs torch {TORCH_NEEDED[0]}.{TORCH_NEEDED[1]}, this is torch {torch.__version__}"
    return None


def cpu_isa() -> str:
    """Instruction set that the loaded CPU kernels use here: plain, avx2 or avx512."""
    return ISA_NAMES[torch.ops.megatune.cpu_isa()]
