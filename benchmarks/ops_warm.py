"""Compiles before anything is timed: what torch.compile and Triton make for the op benchmark, in many processes.

Compiling takes far longer than timing, and torch compiles one function at a time in a process. So as many processes as
there are cores share the cases and call each implementation once; what they compile is in the caches on disk (torch's
and Triton's own) when the benchmark itself asks for it. Which of a kernel's variants is the fastest is not kept: the
processes use the GPU together, and the benchmark finds it again by itself.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

MOST_PROCESSES = 14


def configure_compiler() -> None:
    """The same here and there: caches are found by it."""
    import torch._functorch.config
    import torch._inductor.compile_fx
    import torch._inductor.config

    torch._dynamo.config.recompile_limit = 64  # one function at many sizes
    torch._inductor.config.autotune_local_cache = False
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.fx_graph_cache = True
    torch._functorch.config.enable_autograd_cache = True
    gc.freeze()  # what has been imported is never garbage: looking for some takes a tenth of the time


def warm(arguments: list[str], seconds: float) -> dict[str, Any]:
    """Runs `benchmarks.ops` with these arguments in processes that compile; what became of it."""
    began = time.monotonic()
    count = min(MOST_PROCESSES, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as claims:
        command = [sys.executable, "-m", "benchmarks.ops", *arguments, "--compile-into", claims]
        processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(count)]
        killed = 0
        try:
            for process in processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, began + seconds - time.monotonic()))
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                    killed += 1
        jobs = [json.loads(path.read_text() or "null") for path in Path(claims).iterdir()]
    done = [job for job in jobs if job]
    return {
        "processes": count,
        "killed": killed,
        "failed": sum(process.returncode not in (0, -9) for process in processes),
        "compiled": len(done),
        "unfinished": len(jobs) - len(done),
        "seconds": round(time.monotonic() - began, 1),
        "slowest": sorted(done, key=lambda job: -job[1])[:5],
    }


def share(jobs: Iterable[tuple[str, Callable[[], None]]], claims: Path) -> None:
    """One of those processes: does the jobs (name, what to do) that no other has begun, notes the seconds of each."""
    for name, do in jobs:
        claim = claims / name
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        began = time.monotonic()
        try:
            do()
        except Exception as error:  # it fails again, and is noted, when it is measured
            print(f"{name}: {error}", file=sys.stderr)
        claim.write_text(json.dumps([name, round(time.monotonic() - began, 1)]))
