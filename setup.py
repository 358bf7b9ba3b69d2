"""Builds the C++ parts that this machine allows; everything in megatune also runs without them.

`megatune._pack` (packing of samples; needs a compiler and pybind11) and `megatune/ops/_cpu.so` (CPU kernels; needs a
compiler and torch, so install torch first and use `pip install --no-build-isolation`). What cannot be built is left
out with one warning. Environment: MEGATUNE_BUILD = auto (default) | none | pack | cpu, MAX_JOBS = compilers at a
time, CXX = the compiler.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = Path("csrc")  # setuptools takes relative paths only
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-Wall", "-Wextra", "-Wno-psabi"]
# No effect on values: only says that nothing reads errno or floating-point traps.
MATH_FLAGS = ["-fno-math-errno", "-fno-trapping-math"]
TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11: the binary serves every later torch


def cpu_abi() -> str:
    """The version of the contract between _cpu.so and megatune/ops, written in megatune/ops/_load.py."""
    found = re.search(r'^CPU_ABI = "(\S+)"$', (ROOT / "megatune/ops/_load.py").read_text(), re.MULTILINE)
    assert found is not None, "megatune/ops/_load.py has no CPU_ABI"
    return found[1]


def pack_extension() -> Extension | str:
    if find_spec("pybind11") is None:
        return "megatune._pack needs pybind11"
    import pybind11

    return Extension(
        "megatune._pack",
        [str(CSRC / "pack/packing.cpp")],
        include_dirs=[pybind11.get_include()],
        optional=True,
    )


def cpu_extension() -> Extension | str:
    if find_spec("torch") is None:
        return (
            "megatune/ops/_cpu.so needs torch (install it first, then use pip install --no-build-isolation)"
        )
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        return f"megatune/ops/_cpu.so needs torch 2.11 or later, found {torch.__version__}"
    root = Path(torch.__file__).parent
    return Extension(
        "megatune.ops._cpu",
        sorted(str(path) for path in [*CSRC.glob("cpu/*.cpp"), CSRC / "bind/cpu.cpp"]),
        include_dirs=[str(CSRC / "include"), str(root / "include")],
        library_dirs=[str(root / "lib")],
        libraries=["torch_cpu", "c10"],
        define_macros=[
            ("TORCH_TARGET_VERSION", TORCH_TARGET),
            ("TORCH_STABLE_ONLY", None),
            ("MEGATUNE_CPU_ABI", f'"{cpu_abi()}"'),
        ],
        depends=[str(path) for path in [*CSRC.glob("cpu/*.[hi]*"), *CSRC.glob("include/megatune/*.h")]],
        optional=True,
    )


class BuildWhatWorks(build_ext):
    """Compiles with one plain compiler call per file, several at a time; a failure is a warning, not the end."""

    def get_ext_filename(self, fullname: str) -> str:
        # _cpu.so holds no Python symbols: one file for every Python version.
        if fullname.split(".")[-1] == "_cpu":
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        inputs = [Path(path) for path in [*extension.sources, *extension.depends, __file__]]
        if target.exists() and all(path.stat().st_mtime < target.stat().st_mtime for path in inputs):
            return
        try:
            self._compile(extension, target)
        except subprocess.CalledProcessError as error:
            target.unlink(missing_ok=True)
            warn(f"{extension.name} could not be built and is left out:\n{error.stderr[-2000:]}")

    def _compile(self, extension: Extension, target: Path) -> None:
        objects_dir = Path(self.build_temp) / extension.name
        objects_dir.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{path}" for path in [*extension.include_dirs, *self.include_dirs]]
        macros = [
            f"-D{name}" if value is None else f"-D{name}={value}" for name, value in extension.define_macros
        ]

        def compile_one(source: str) -> str:
            output = objects_dir / f"{Path(source).parent.name}_{Path(source).stem}.o"
            run([compiler(), *FLAGS, *MATH_FLAGS, *includes, *macros, "-c", source, "-o", str(output)])
            return str(output)

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile_one, extension.sources))
        libraries = [f"-L{path}" for path in extension.library_dirs] + [
            f"-l{name}" for name in extension.libraries
        ]
        unfinished = target.with_suffix(f".{os.getpid()}.tmp")
        run([compiler(), "-shared", *objects, "-o", str(unfinished), *libraries])
        os.replace(unfinished, target)  # a process that has the old file mapped keeps it


def compiler() -> str | None:
    wanted = os.environ.get("CXX")
    return (
        shutil.which(wanted)
        if wanted
        else shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    )


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def warn(message: str) -> None:
    print(f"warning: megatune: {message}", file=sys.stderr)


def extensions() -> list[Extension]:
    wanted = os.environ.get("MEGATUNE_BUILD", "auto")
    if wanted not in ("auto", "none", "pack", "cpu"):
        raise SystemExit(f"MEGATUNE_BUILD is {wanted!r}, must be auto, none, pack or cpu")
    if wanted == "none":
        return []
    if compiler() is None:
        warn(
            "no C++ compiler found (g++, clang++ or $CXX): installing without binaries, the slower references run"
        )
        return []
    built = [
        make()
        for name, make in (("pack", pack_extension), ("cpu", cpu_extension))
        if wanted in ("auto", name)
    ]
    for reason in built:
        if isinstance(reason, str):
            warn(f"{reason}: left out")
    return [extension for extension in built if isinstance(extension, Extension)]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildWhatWorks})
