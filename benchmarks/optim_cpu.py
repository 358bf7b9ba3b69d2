"""AdamW on the CPU: ours in one pass, against the memory's speed, torch's fused kernel and DeepSpeed's whole host step.

    OMP_NUM_THREADS=2 python -m benchmarks.optim_cpu [--elements 64000000] [--repeats 15] [--out FILE]

All update the same number of elements; the best of `repeats`, taken in turns, so that other programs on the machine hit
all alike. Ours: bf16 gradient in, scale applied, masters and moments in fp32, bf16 weight out, 28 bytes an element.

`limit`: a C++ loop (read_modify_write.cpp, compiled here by g++ -O3 -march=native) that reads, changes in place and
writes the same bytes, on as many threads: of several ways to do it (order, prefetch, stores past the caches) the best.

DeepSpeed's host step is its own order (`step` of its stages 1 and 2): unscale the fp32 gradients, CPUAdam, copy to
bf16, 42 bytes an element; and with gradients that come in bf16, which it must widen first, 48. It is left out, with the
reason, where deepspeed or its kernel cannot be had; set TORCH_EXTENSIONS_DIR to a folder where the kernel is built.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Several libraries have threads of their own here, and those that wait must not take the cores of those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from benchmarks.common import RESULTS, device_name
from megatune import ops

BYTES = 28
BETAS, EPS, LR, DECAY = (0.9, 0.999), 1e-8, 1e-3, 0.1
Step = Callable[[], None]


class Tensors:
    def __init__(self, elements: int) -> None:
        torch.manual_seed(0)
        self.master = torch.randn(elements)
        self.m, self.v = torch.zeros(elements), torch.zeros(elements)
        self.grad = torch.randn(elements).bfloat16()
        self.weight = torch.zeros(elements, dtype=torch.bfloat16)
        self.scale = torch.tensor(0.5)


def ours(t: Tensors) -> Step:
    def step() -> None:
        ops.adamw_(
            [t.master], [t.m], [t.v], [t.grad], weights=[t.weight], scale=t.scale, decays=[DECAY], lr=LR,
            betas=BETAS, eps=EPS, step=10,
        )  # fmt: skip

    return step


def limits(t: Tensors) -> dict[str, Step]:
    """The ways to move the same bytes, by name."""
    folder = tempfile.mkdtemp()
    library = Path(folder) / "read_modify_write.so"
    source = Path(__file__).with_name("read_modify_write.cpp")
    command = ["g++", "-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    run = ctypes.CDLL(str(library)).read_modify_write
    streams = [ctypes.c_void_p(one.data_ptr()) for one in (t.master, t.m, t.v, t.grad, t.weight)]
    n, threads = ctypes.c_int64(t.master.numel()), torch.get_num_threads()
    found = {}
    for piece in (256, 4096, t.master.numel()):
        for stream in (0, 1):
            for prefetch in (0, 1):
                name = f"{min(piece, 10**6)} elements of each, stores past the caches {stream}, prefetch {prefetch}"
                rest = ctypes.c_int64(piece), stream, prefetch, ctypes.c_float(1.0)
                found[name] = lambda rest=rest: run(*streams, n, threads, *rest)
    return found


def torch_fused(t: Tensors) -> dict[str, Step]:
    """The fused kernel alone, and with the passes around it that it needs: cast, unscale, bf16 copy."""
    p = torch.nn.Parameter(t.master.clone())
    optimizer = torch.optim.AdamW([p], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)
    p.grad = t.grad.float()

    def whole() -> None:
        p.grad.copy_(t.grad)
        p.grad.mul_(0.5)
        optimizer.step()
        t.weight.copy_(p.detach())

    alone = lambda: optimizer.step() and None  # noqa: E731
    return {"torch fused AdamW alone": alone, "torch fused AdamW, widen, unscale, bf16 copy": whole}


def deepspeed(t: Tensors) -> dict[str, Step] | str:
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        p = torch.nn.Parameter(t.master.clone())
        optimizer = DeepSpeedCPUAdam(
            [p], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, adamw_mode=True, fp32_optimizer_states=True
        )
        p.grad = t.grad.float()
        optimizer.step()
    except Exception as error:  # whatever its build of the kernel raises
        return f"{type(error).__name__}: {error}"[:300]

    def alone() -> None:
        optimizer.step()

    def host_step() -> None:
        p.grad.mul_(0.5)
        optimizer.step()
        t.weight.copy_(p.detach())

    def from_bf16() -> None:
        p.grad.copy_(t.grad)
        host_step()

    return {
        "DeepSpeedCPUAdam alone": alone,
        "DeepSpeed host step": host_step,
        "DeepSpeed host step, bf16 gradients": from_bf16,
    }


def best(steps: dict[str, Step], repeats: int) -> dict[str, float]:
    """Milliseconds of the fastest of `repeats` runs of each, in turns."""
    found = dict.fromkeys(steps, float("inf"))
    for turn in range(repeats + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if turn:
                found[name] = min(found[name], (time.perf_counter() - began) * 1e3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--elements", type=int, default=64_000_000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", default=str(RESULTS / "optim_cpu.json"))
    options = parser.parse_args()
    tensors = Tensors(options.elements)
    ways = limits(tensors)
    # Two rounds of all ways to find the best, which then takes turns with the others.
    first = best(ways, 2)
    kept = sorted(ways, key=first.__getitem__)[:3]
    rival = deepspeed(tensors)
    steps = {"megatune": ours(tensors)} | {name: ways[name] for name in kept} | torch_fused(tensors)
    steps |= {} if isinstance(rival, str) else rival
    milliseconds = best(steps, options.repeats)
    limit = min(kept, key=milliseconds.__getitem__)
    mine = milliseconds["megatune"]
    facts = {
        "benchmark": "optim_cpu",
        "device": device_name(),
        "torch": torch.__version__,
        "body": ops.chosen("cpu", torch.float32)["adamw"],
        "elements": options.elements,
        "milliseconds": {name: round(value, 2) for name, value in milliseconds.items()},
        "gigabytes_a_second": round(BYTES * options.elements / mine / 1e6, 1),
        "limit": {"way": limit, "gigabytes_a_second": round(BYTES * options.elements / milliseconds[limit] / 1e6, 1)},
        "share_of_limit": round(milliseconds[limit] / mine, 3),
        "times_faster_than": {
            name: round(value / mine, 2) for name, value in milliseconds.items() if name not in ("megatune", *kept)
        },
        "deepspeed": "run" if not isinstance(rival, str) else f"left out: {rival}",
    }  # fmt: skip
    text = json.dumps(facts, indent=1)
    print(text)
    with open(options.out, "w") as file:
        file.write(text + "\n")


if __name__ == "__main__":
    main()
