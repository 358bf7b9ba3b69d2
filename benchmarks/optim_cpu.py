"""AdamW on the CPU: ours in one pass, against the memory's speed, torch's fused kernel and DeepSpeed's whole host step.

    python -m benchmarks.optim_cpu [--elements 20000000] [--repeats 15] [--out FILE]

All update the same number of elements from the same gradients; the best of `repeats`, taken in turns, so that other
programs on the machine hit all alike. Bytes an element: bf16 gradient 2, masters and moments read and written 24, bf16
weight 2. `memory`: a loop in torch with the same mix of reads and writes in place and no arithmetic to speak of: its
bandwidth is the limit that the share is of. DeepSpeed's step is its own order: gradients to fp32, unscale, CPUAdam,
fp32 to bf16; it is left out, with the reason, where deepspeed or its kernel cannot be had.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

from benchmarks.common import RESULTS, device_name
from megatune import ops

BYTES = 28


class Tensors:
    def __init__(self, elements: int) -> None:
        torch.manual_seed(0)
        self.master = torch.randn(elements)
        self.m, self.v = torch.zeros(elements), torch.zeros(elements)
        self.grad = torch.randn(elements).bfloat16()
        self.wide = self.grad.float()
        self.weight = torch.zeros(elements, dtype=torch.bfloat16)
        self.scale = torch.tensor(0.5)


def ours(t: Tensors) -> Callable[[], None]:
    def step() -> None:
        ops.adamw_(
            [t.master], [t.m], [t.v], [t.grad], weights=[t.weight], scale=t.scale, decays=[0.1], lr=1e-3,
            betas=(0.9, 0.999), eps=1e-8, step=10,
        )  # fmt: skip

    return step


def memory(t: Tensors) -> Callable[[], None]:
    """24 of the 28 bytes are three tensors multiplied in place, 4 a copy of bf16."""

    def step() -> None:
        for tensor in (t.master, t.m, t.v):
            tensor.mul_(1.0)
        t.weight.copy_(t.grad)

    return step


def torch_fused(t: Tensors) -> Callable[[], None]:
    """The fused kernel, with the passes around it that it needs: cast, unscale, bf16 copy."""
    p = torch.nn.Parameter(t.master.clone())
    optimizer = torch.optim.AdamW([p], lr=1e-3, weight_decay=0.1, fused=True)
    p.grad = torch.empty_like(p)

    def step() -> None:
        p.grad.copy_(t.grad)
        p.grad.mul_(0.5)
        optimizer.step()
        t.weight.copy_(p.detach())

    return step


def torch_fused_alone(t: Tensors) -> Callable[[], None]:
    p = torch.nn.Parameter(t.master.clone())
    optimizer = torch.optim.AdamW([p], lr=1e-3, weight_decay=0.1, fused=True)
    p.grad = t.wide

    return lambda: optimizer.step() and None


def deepspeed(t: Tensors) -> Callable[[], None] | str:
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        p = torch.nn.Parameter(t.master.clone())
        optimizer = DeepSpeedCPUAdam([p], lr=1e-3, weight_decay=0.1, adamw_mode=True)
    except Exception as error:  # whatever its build of the kernel raises
        return f"{type(error).__name__}: {error}"[:300]
    p.grad = torch.empty_like(p)

    def step() -> None:
        p.grad.copy_(t.grad)
        p.grad.mul_(0.5)
        optimizer.step()
        t.weight.copy_(p.detach())

    return step


def best(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    seconds = dict.fromkeys(steps, float("inf"))
    for turn in range(repeats + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if turn:
                seconds[name] = min(seconds[name], time.perf_counter() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--elements", type=int, default=20_000_000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", default=str(RESULTS / "optim_cpu.json"))
    options = parser.parse_args()
    tensors = Tensors(options.elements)
    steps = {
        "megatune": ours(tensors),
        "memory": memory(tensors),
        "torch fused AdamW, fp32 gradient, no passes around it": torch_fused_alone(tensors),
        "torch fused AdamW, whole step": torch_fused(tensors),
    }
    rival = deepspeed(tensors)
    if not isinstance(rival, str):
        steps["DeepSpeed, whole host step"] = rival
    seconds = best(steps, options.repeats)
    rate = BYTES * options.elements / seconds["megatune"]
    facts = {
        "benchmark": "optim_cpu",
        "device": device_name(),
        "torch": torch.__version__,
        "body": ops.chosen("cpu", torch.float32)["adamw"],
        "elements": options.elements,
        "milliseconds": {name: round(value * 1e3, 2) for name, value in seconds.items()},
        "gigabytes_a_second": round(rate / 1e9, 1),
        "share_of_memory": round(seconds["memory"] / seconds["megatune"], 3),
        "times_faster_than": {
            name: round(value / seconds["megatune"], 2)
            for name, value in seconds.items()
            if name != "megatune"
        },
        "deepspeed": "run" if not isinstance(rival, str) else f"left out: {rival}",
    }
    text = json.dumps(facts, indent=1)
    print(text)
    with open(options.out, "w") as file:
        file.write(text + "\n")


if __name__ == "__main__":
    main()
