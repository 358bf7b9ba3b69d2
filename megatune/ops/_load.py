"""Finds and loads the compiled kernels (_cpu.so, _cuda.so), or says why other bodies run instead."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import torch

CPU_ABI = "7"
CUDA_ABI = "7"
TORCH_NEEDED = (2, 11)  # what the libraries are compiled for (setup.py); later versions run them too
ISA_NAMES = ("plain", "avx2", "avx512")
BUILD = "pip install --no-build-isolation -e ."


@cache
def cpu_problem() -> str | None:
    """Loads _cpu.so on the first call. None: its kernels can be used; else why not.

    A file made for another version is not loaded; that gives one warning.
    """
    return _library_problem("cpu", CPU_ABI)


@cache
def cuda_problem() -> str | None:
    """Loads _cuda.so on the first call on a machine with a GPU. None: its kernels can be used; else why not.

    A file that is there but cannot be used gives one warning.
    """
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    problem = _library_problem("cuda", CUDA_ABI)
    if problem is not None:
        return problem
    error = torch.ops.megatune.cuda_error()
    if error == 0:
        return None
    return _warned(f"{_path('cuda')} is not used: {_device_problem(error)}")


def _device_problem(error: int) -> str:
    """What a CUDA error means that comes from asking for a kernel."""
    if error == 209:  # cudaErrorNoKernelImageForDevice
        major, minor = torch.cuda.get_device_capability()
        architecture = f"{major}.{minor}"
        return (
            f"it holds no code for this GPU; build it again with TORCH_CUDA_ARCH_LIST={architecture} {BUILD}"
        )
    if error in (35, 222):  # cudaErrorInsufficientDriver, cudaErrorUnsupportedPtxVersion
        return "the NVIDIA driver is older than the toolkit that built it; build it again with an older nvcc"
    return f"CUDA error {error}"


def _path(kind: str) -> Path:
    return Path(__file__).with_name(f"_{kind}.so")


def _library_problem(kind: str, abi: str) -> str | None:
    path = _path(kind)
    if not path.exists():
        return f"megatune/ops/{path.name} is not built ({BUILD} builds it)"
    problem = _misfit(path, f"megatune-{kind}-abi={abi};")
    if problem is None:
        try:
            torch.ops.load_library(str(path))
            return None
        except OSError as error:
            problem = f"it cannot be loaded ({error})"
    return _warned(f"{path} is not used: {problem}; build it again with {BUILD}")


def _warned(problem: str) -> str:
    warnings.warn(problem, stacklevel=4)
    return problem


def _misfit(path: Path, signature: str) -> str | None:
    """Why a library must not even be opened; it says in plain text what it was made for."""
    if signature.encode() not in path.read_bytes():
        return "it was built from another version of megatune"
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < TORCH_NEEDED:
        return f"it needs torch {TORCH_NEEDED[0]}.{TORCH_NEEDED[1]}, this is torch {torch.__version__}"
    return None


def cpu_isa() -> str:
    """Instruction set that the loaded CPU kernels use here: plain, avx2 or avx512."""
    return ISA_NAMES[torch.ops.megatune.cpu_isa()]
