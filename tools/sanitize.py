"""Run compute-sanitizer over every CUDA kernel and keep what it says.

    python tools/sanitize.py [--tools memcheck,racecheck,initcheck] [--out docs/sanitizer]

Needs a GPU and compute-sanitizer (of the CUDA toolkit). Each tool runs tools/cuda_once.py and watches megatune's
kernels alone; memory is taken from the driver for each tensor, so that a kernel that reads or writes beyond one is
seen. OUT/TOOL.log holds the versions and the tool's own words. Exit code 1 where a tool found something.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOUND = 86  # compute-sanitizer's exit code where it found an error
TOOLS = {
    "memcheck": ["--leak-check", "no"],
    "racecheck": ["--racecheck-report", "all"],
    "initcheck": [],
}


def sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which(os.path.join(home, "bin", "compute-sanitizer"))


def first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return lines[-1] if lines else "?"


def head(program: str, command: list[str]) -> str:
    """Versions, for the log."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    state = first_line("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    lines = [
        f"GPU, driver: {first_line(*query) if shutil.which('nvidia-smi') else '?'}",
        f"compute-sanitizer: {first_line(program, '--version')}",
        f"torch {version('torch')}, Python {platform.python_version()}, megatune {state}",
        f"command: {' '.join(Path(part).name if '/' in part else part for part in command)}",
    ]
    return "\n".join(lines) + "\n\n"


def check(program: str, tool: str, script: list[str], out: Path, seconds: float) -> int:
    """Runs one tool; -> its exit code, 0: nothing found."""
    command = [
        program,
        "--tool",
        tool,
        "--error-exitcode",
        str(FOUND),
        "--kernel-name",
        "kernel_substring=megatune",
    ]
    command += [*TOOLS[tool], *script]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        said, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        said, code = (error.stdout or b"").decode(), 1
        said += f"\nstopped after {seconds:.0f} s\n"
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{tool}.log").write_text(head(program, command) + said)
    verdict = {0: "clean", FOUND: "ERRORS FOUND"}.get(code, f"failed with exit code {code}")
    print(f"{tool}: {verdict}, {time.monotonic() - began:.0f} s; {out / (tool + '.log')}")
    if code:
        lines = said.splitlines()
        print("\n".join(lines if len(lines) < 50 else [*lines[:30], "..", *lines[-15:]]))
    return code


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "sanitizer")
    parser.add_argument("--seconds", type=float, default=120, help="for each tool")
    options = parser.parse_args(arguments)
    tools = options.tools.split(",")
    if unknown := [tool for tool in tools if tool not in TOOLS]:
        parser.error(f"--tools has {unknown[0]!r}, must be of {', '.join(TOOLS)}")
    program = sanitizer()
    if program is None:
        parser.error(
            "compute-sanitizer is not here: put the CUDA toolkit's bin on the PATH, or set CUDA_HOME"
        )
    script = [sys.executable, str(Path("tools/cuda_once.py"))]
    return max(1 if check(program, tool, script, options.out, options.seconds) else 0 for tool in tools)


if __name__ == "__main__":
    sys.exit(main())
