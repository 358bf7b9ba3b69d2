"""Compile every CUDA kernel and compare what it needs with csrc/sass.json; no GPU is needed.

    python tools/check_sass.py [--write]

For each kernel and architecture: registers, bytes of shared memory, and (with cuobjdump, from CUDA_HOME, the PATH or
Triton's wheel) the number of tensor core instructions HGMMA. Exit code 1 and one line for each thing that is wrong:
spilled registers, ptxas warnings C75xx (a wgmma that is serialised, a register limit that is ignored), a kernel that is
not in the table or no longer there, more registers or shared memory than the table says, HGMMA lost. `--write` makes
the table anew; spills and warnings are refused there too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "csrc" / "sass.json"
OBJECTS = Path("megatune.ops._cuda")
SLACK = 8  # registers that another release of ptxas may take more

Kernels = dict[str, dict[str, dict[str, int]]]  # {kernel: {architecture: {what: number}}}

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
_WARNING = re.compile(r"\bC75\d\d\b|potential performance loss|\bwarning\b", re.IGNORECASE)
_FUNCTION = re.compile(r"Function : (\w+)")


def compile_all(folder: Path) -> Path:
    """Compiles what has changed with setup.py; -> the folder of the objects and of what ptxas said."""
    environment = os.environ | {"MEGATUNE_CUDA_CHECK": "1"}
    environment.pop(
        "TORCH_CUDA_ARCH_LIST", None
    )  # the table is of the architectures that are built by default
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return folder / OBJECTS


def parse(log: str) -> tuple[Kernels, list[str]]:
    """What `ptxas -v` printed -> (kernels by mangled name, what is wrong)."""
    kernels: Kernels = {}
    wrong = []
    name = architecture = ""
    for line in log.splitlines():
        if found := _ENTRY.search(line):
            name, architecture = found.groups()
        elif (found := _SPILLS.search(line)) and any(map(int, found.groups())):
            wrong.append(f"{name} on {architecture} spills registers: {line.strip()}")
        elif found := _USED.search(line):
            numbers = {"registers": int(found[1]), "shared": int(found[2] or 0)}
            kernels.setdefault(name, {})[architecture] = numbers
        elif _WARNING.search(line):
            wrong.append(f"{name} on {architecture}: {line.strip()}")
    return kernels, wrong


def demangled(kernels: Kernels) -> Kernels:
    """The same by names that a person reads, without the namespace that differs from build to build."""
    names = list(kernels)
    filter_ = shutil.which("c++filt")
    if filter_ is None or not names:
        return kernels
    done = subprocess.run([filter_], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(map(short, done.stdout.splitlines()), kernels.values(), strict=True))


def short(name: str) -> str:
    """`void megatune::cuda::(anonymous namespace)::f<int>(Args, long)` -> `f<int>`."""
    name = name.replace("(anonymous namespace)::", "").replace("megatune::cuda::", "").removeprefix("void ")
    return name.partition("(")[0]


def disassembler() -> str | None:
    home = os.environ.get("CUDA_HOME")
    places = [Path(home) / "bin"] if home else []
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends/nvidia/bin")
    for place in places:
        if (place / "cuobjdump").exists():
            return str(place / "cuobjdump")
    return shutil.which("cuobjdump")


def count_hgmma(tool: str, item: Path, architecture: str) -> dict[str, int]:
    """{mangled kernel: HGMMA instructions} of one object file."""
    command = [tool, "-sass", "-arch", architecture, str(item)]
    counts: dict[str, int] = {}
    name = ""
    for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines():
        if found := _FUNCTION.search(line):
            name = found[1]
            counts[name] = 0
        elif "HGMMA" in line and name:
            counts[name] += 1
    return counts


def measure(folder: Path) -> tuple[dict[str, Kernels], list[str]]:
    """({source: kernels}, what is wrong) of all objects in a folder."""
    tool = disassembler()
    found: dict[str, Kernels] = {}
    wrong = []
    for log in sorted(folder.glob("cuda_*.cu.log")):
        kernels, problems = parse(log.read_text())
        source = log.name.removesuffix(".log")
        wrong += [f"{source}: {problem}" for problem in problems]
        if tool is not None:
            for architecture in {known for each in kernels.values() for known in each}:
                for name, count in count_hgmma(tool, log.with_suffix(".o"), architecture).items():
                    if name in kernels and architecture in kernels[name]:
                        kernels[name][architecture]["hgmma"] = count
        found[source] = demangled(kernels)
    return found, wrong


def compare(found: dict[str, Kernels], table: dict[str, Kernels]) -> list[str]:
    """What in the kernels found is worse than the table allows, or differs in name."""
    wrong = []
    flat, known = _flat(found), _flat(table)
    wrong += [f"{name} is not in {TABLE.name}" for name in sorted(flat.keys() - known.keys())]
    wrong += [f"{name} is in {TABLE.name} and not compiled" for name in sorted(known.keys() - flat.keys())]
    for name in sorted(flat.keys() & known.keys()):
        now, then = flat[name], known[name]
        if now["registers"] > then["registers"] + SLACK:
            wrong.append(f"{name} takes {now['registers']} registers, the table says {then['registers']}")
        if now["shared"] > then["shared"]:
            wrong.append(
                f"{name} takes {now['shared']} bytes of shared memory, the table says {then['shared']}"
            )
        if "hgmma" in now and then.get("hgmma") and not now["hgmma"]:
            wrong.append(f"{name} has no HGMMA any more, the table says {then['hgmma']}")
    return wrong


def _flat(sources: dict[str, Kernels]) -> dict[str, dict[str, int]]:
    return {
        f"{source} {name} {architecture}": numbers
        for source, kernels in sources.items()
        for name, each in kernels.items()
        for architecture, numbers in each.items()
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="make csrc/sass.json anew")
    options: Any = parser.parse_args(arguments)
    found, wrong = measure(compile_all(ROOT / "build" / "objects"))
    if options.write and not wrong:
        TABLE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        print(f"{TABLE.relative_to(ROOT)}: {len(_flat(found))} kernels")
        return 0
    if not options.write:
        wrong += compare(found, json.loads(TABLE.read_text()))
    for line in wrong:
        print(line)
    if not wrong:
        print(f"{len(_flat(found))} kernels as in {TABLE.relative_to(ROOT)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
