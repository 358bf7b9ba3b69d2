"""Builds the C++ and CUDA parts that this machine allows; everything in megatune also runs without them.

`megatune._pack` (packing of samples; needs a compiler and pybind11), `megatune/ops/_cpu.so` (CPU kernels; needs a
compiler and torch, so install torch first and use `pip install --no-build-isolation`) and `megatune/ops/_cuda.so`
(CUDA kernels; needs nvcc too, but no GPU, and any build of torch will do). What cannot be built is left out with one
warning, the last thing that a build says. Only files that have changed are compiled again.

A wheel is for every Python: the libraries hold no Python symbols and are for torch 2.11 and later. `_pack` alone
(pybind11 has no stable ABI) is for the Python that built it; another one does not see it and packs in Python.
Environment:

    MEGATUNE_BUILD         auto (default: CUDA only where nvcc is found) | none | pack | cpu | cuda
    MEGATUNE_CUDA_CHECK=1  compile the CUDA part, fail if something is wrong with it, install nothing
    TORCH_CUDA_ARCH_LIST   architectures, default "8.0+PTX;9.0a"
    CUDA_HOME              where bin/nvcc is; where it is not, nvcc is looked for on the PATH
    MAX_JOBS               compilers at a time, default one a core
    CXX                    the C++ compiler
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = Path("csrc")  # setuptools takes relative paths only
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-Wall", "-Wextra", "-Wno-psabi"]
# No effect on values: only says that nothing reads errno or floating-point traps.
MATH_FLAGS = ["-fno-math-errno", "-fno-trapping-math"]
# What ptxas says of each kernel is kept beside the object, for tools/check_sass.py.
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden,-Wall",
    "-Xptxas",
    "-v",
]
CUDA_ARCHITECTURES = "8.0+PTX;9.0a"
TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11: the binary serves every later torch
CUDA_CHECK = os.environ.get("MEGATUNE_CUDA_CHECK") == "1"
LEFT_OUT: list[str] = []  # what is not built, and why; said when the build is over, where nobody can miss it


def abi(kind: str) -> str:
    """The version of the contract between _cpu.so or _cuda.so and megatune/ops, from megatune/ops/_load.py."""
    text = (ROOT / "megatune/ops/_load.py").read_text()
    found = re.search(rf'^{kind}_ABI = "(\S+)"$', text, re.MULTILINE)
    assert found is not None, f"megatune/ops/_load.py has no {kind}_ABI"
    return found[1]


def pack_extension() -> Extension | str:
    if find_spec("pybind11") is None:
        return "megatune._pack needs pybind11"
    import pybind11

    sources = sorted(str(path) for path in CSRC.glob("pack/*.cpp"))
    return Extension("megatune._pack", sources, include_dirs=[pybind11.get_include()], optional=True)


def torch_extension(kind: str, sources: list[Path]) -> Extension | str:
    """megatune/ops/_{kind}.so over torch's stable ABI."""
    name = f"megatune/ops/_{kind}.so"
    torch = find_spec("torch")  # found, not imported: that takes seconds
    if torch is None or torch.origin is None:
        return f"{name} needs torch (install it first, then use pip install --no-build-isolation)"
    found = version("torch")
    if tuple(int(part) for part in found.split(".")[:2]) < (2, 11):
        return f"{name} needs torch 2.11 or later, found {found}"
    root = Path(torch.origin).parent
    macros = [("TORCH_TARGET_VERSION", TORCH_TARGET), ("TORCH_STABLE_ONLY", None)]
    return Extension(
        f"megatune.ops._{kind}",
        sorted(map(str, sources)),
        include_dirs=[str(CSRC / "include"), str(root / "include")],
        library_dirs=[str(root / "lib")],
        libraries=["torch_cpu", "c10"],
        define_macros=[*macros, (f"MEGATUNE_{kind.upper()}_ABI", f'"{abi(kind.upper())}"')],
        optional=True,
    )


def cpu_extension() -> Extension | str:
    return torch_extension("cpu", [*CSRC.glob("cpu/*.cpp"), *CSRC.glob("bind/cpu*.cpp")])


def cuda_extension() -> Extension | str:
    if nvcc() is None:
        return "megatune/ops/_cuda.so needs nvcc (set CUDA_HOME, or put nvcc on the PATH)"
    architectures()  # a wrong list is an error now
    # torch's libraries for CUDA are not linked: bind/cuda.h finds what it needs of them at run time.
    return torch_extension("cuda", [*CSRC.glob("cuda/**/*.cu"), *CSRC.glob("bind/cuda*.cpp")])


class BuildWhatWorks(build_ext):
    """Compiles with one plain compiler call per file, several at a time; a failure is a warning, not the end."""

    def finalize_options(self) -> None:
        # One place for the objects, also under pip, whose own folder is thrown away after an editable install.
        if self.build_temp is None:
            self.build_temp = str(ROOT / "build" / "objects")
        super().finalize_options()

    def get_ext_filename(self, fullname: str) -> str:
        # These hold no Python symbols: one file for every Python version.
        if fullname.split(".")[-1] in ("_cpu", "_cuda"):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def run(self) -> None:
        super().run()
        for reason in LEFT_OUT:
            warn(reason)

    def build_extension(self, extension: Extension) -> None:
        objects = Path(self.build_temp) / extension.name
        target = Path(self.get_ext_fullpath(extension.name))
        if CUDA_CHECK:
            target = objects / target.name
        try:
            self._build(extension, objects, target)
        except subprocess.CalledProcessError as error:
            if CUDA_CHECK:
                raise SystemExit(f"{extension.name} cannot be built:\n{error.stderr}") from None
            target.unlink(missing_ok=True)
            said = f"{shlex.join(error.cmd)}\n{error.stdout}{error.stderr}"
            (objects / "failed.log").write_text(said)
            LEFT_OUT.append(
                f"{extension.name} could not be built: {first_error(said)} (more in {objects / 'failed.log'})"
            )

    def _build(self, extension: Extension, folder: Path, target: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{path}" for path in [*extension.include_dirs, *self.include_dirs]]
        macros = [
            f"-D{name}" if value is None else f"-D{name}={value}" for name, value in extension.define_macros
        ]

        def compile_one(source: str) -> Path:
            output = folder / ("_".join(Path(source).parts[1:]) + ".o")
            if source.endswith(".cu"):
                command = [nvcc(), *host_compiler(), *NVCC_FLAGS, *architectures(), f"-I{CSRC / 'include'}"]
            else:
                command = [compiler(), *FLAGS, *MATH_FLAGS, *includes, *macros]
            make_object(command, Path(source), output)
            return output

        sources = sorted(extension.sources, key=lambda name: not name.endswith(".cu"))  # the longest first
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile_one, sources))
        libraries = [f"-L{path}" for path in extension.library_dirs]
        libraries += [f"-l{name}" for name in extension.libraries]
        if any(source.endswith(".cu") for source in sources):
            # cudart comes in statically, so that the machine needs a driver and no toolkit.
            link = [nvcc(), *host_compiler(), "-shared", "-cudart", "static", "-Xlinker", "--no-undefined"]
        else:
            link = [compiler(), "-shared"]
        # Some toolchains have the C++ library as an archive alone. Its symbols must not be seen from outside: half of
        # them would be bound to the process's own C++ library, and a refused argument would crash.
        link += ["-Xlinker", "--exclude-libs=ALL"]
        command = [*link, *map(str, objects), *libraries]
        if target.exists() and up_to_date(target, command, objects, folder / "link.cmd"):
            return
        unfinished = target.with_suffix(f".{os.getpid()}.tmp")
        run([*command, "-o", str(unfinished)])
        os.replace(unfinished, target)  # a process that has the old file mapped keeps it
        (folder / "link.cmd").write_text(shlex.join(command))


class WheelForEveryPython(bdist_wheel):
    """py3-none-PLATFORM: see the head of this file."""

    def run(self) -> None:
        # What an older build left there would go into the wheel too. Objects are elsewhere: nothing is compiled again.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def make_object(command: list[str], source: Path, output: Path) -> None:
    """Compiles source unless output is newer than all that it was made of, and was made by the same command.

    Beside NAME.o stand NAME.d (what it was made of), NAME.log (what the compiler said) and NAME.cmd.
    """
    said, made_of, by = (output.with_suffix(suffix) for suffix in (".log", ".d", ".cmd"))
    if output.exists() and said.exists() and made_of.exists():
        inputs = [Path(name) for name in dependencies(made_of.read_text())]
        if up_to_date(output, command, inputs, by):
            return
    began = time.time()
    unfinished = output.with_suffix(f".{os.getpid()}.tmp.o")
    dependency_file = unfinished.with_suffix(".d")
    outputs = ["-MMD", "-MF", str(dependency_file), "-MT", "object", "-o", str(unfinished)]
    done = run([*command, *outputs, "-c", str(source)])
    said.write_text(done.stdout + done.stderr)
    os.replace(dependency_file, made_of)
    os.utime(unfinished, (began, began))  # what was edited meanwhile is newer
    os.replace(unfinished, output)
    by.write_text(shlex.join(command))


def up_to_date(output: Path, command: list[str], inputs: list[Path], command_file: Path) -> bool:
    if not command_file.exists() or command_file.read_text() != shlex.join(command):
        return False
    made = output.stat().st_mtime
    return all(path.exists() and path.stat().st_mtime <= made for path in inputs)


def dependencies(text: str) -> list[str]:
    """The names in a dependency file "object: a b \\ c"."""
    return shlex.split(text.replace("\\\n", " ").partition(":")[2])


def compiler() -> str | None:
    wanted = os.environ.get("CXX")
    return (
        shutil.which(wanted)
        if wanted
        else shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    )


def host_compiler() -> list[str]:
    return ["-ccbin", str(compiler())] if os.environ.get("CXX") else []


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (shutil.which(os.path.join(home, "bin", "nvcc")) if home else None) or shutil.which("nvcc")


@cache
def architectures() -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST: "8.0;9.0a", also with blanks; "+PTX": for later ones too."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
    flags = []
    for name in wanted.replace(";", " ").split():
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if found is None:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST has {name!r}, must be of numbers such as 8.0, 9.0a, 8.0+PTX"
            )
        number, suffix = found[1] + found[2], found[3]
        if number == "90":
            suffix = "a"  # the tensor cores of Hopper are reached by this one only
        flags.append(f"-gencode=arch=compute_{number}{suffix},code=sm_{number}{suffix}")
        if found[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True)


def warn(reason: str) -> None:
    print(f"warning: megatune: left out: {reason}", file=sys.stderr)


def first_error(said: str) -> str:
    """The line of a compiler's or linker's output that says what is wrong."""
    lines = [line.strip() for line in said.splitlines()[1:] if line.strip()]
    telling = [
        line for line in lines if re.search(r"\berror\b|cannot find|undefined reference|[Uu]nsupported", line)
    ]
    return (telling or lines or ["the compiler failed and said nothing"])[0][:300]


def has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def extensions() -> list[Extension]:
    wanted = "cuda" if CUDA_CHECK else os.environ.get("MEGATUNE_BUILD", "auto")
    if wanted not in ("auto", "none", "pack", "cpu", "cuda"):
        raise SystemExit(f"MEGATUNE_BUILD is {wanted!r}, must be auto, none, pack, cpu or cuda")
    if wanted == "none":
        return []
    if compiler() is None:
        warn("all binaries: no C++ compiler found (g++, clang++ or $CXX); the slower references run")
        return []
    makers = {"pack": pack_extension, "cpu": cpu_extension, "cuda": cuda_extension}
    if wanted == "auto" and nvcc() is None and not has_gpu():
        del makers["cuda"]  # a machine without CUDA misses nothing
    built = [make() for name, make in makers.items() if wanted in ("auto", name)]
    for reason in built:
        if isinstance(reason, str):
            if CUDA_CHECK:
                raise SystemExit(reason)
            LEFT_OUT.append(reason)
    return [extension for extension in built if isinstance(extension, Extension)]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildWhatWorks, "bdist_wheel": WheelForEveryPython})
