"""The head and its loss on one GPU, at Llama-3-8B's sizes in bf16: time beside the bare products, memory, bandwidth.

    python -m benchmarks.linear_loss [--rows 16384] [--out FILE]

`linear_cross_entropy`, forward and backward with both gradients, for each of its fused bodies and some chunks, as a
multiple of its three matrix products by themselves (whole, with bf16 results), which are timed in turn with it and have
its numbers (`Device.beside_products`, as in the op benchmark). And its peak memory beyond the inputs and the weight's
fp32 gradient. Then the loss of given logits (`cross_entropy_rows`, and `cross_entropy` with its backward): bytes that
must move, each logit read once and its gradient written once, as a share of what a copy of the same logits reaches.
Milliseconds between two events, medians (`Device.steady`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import device_name
from benchmarks.ops_cases import Work
from benchmarks.ops_cases_loss import head_operands
from benchmarks.ops_timing import Device
from megatune import ops
from megatune.ops import cross_entropy_rows as rows_module

HIDDEN, VOCAB = 4096, 128256
GIB = 2**30


def peak_bytes(function: Callable[[], Any]) -> int:
    """What function allocates at its peak beyond what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def fused_bodies(op: str) -> list[str]:
    found = [body for body in ops.OPS[op].bodies.values() if body.name in ("compiled", "cuda")]
    return [body.name for body in found if body.unfit("cuda", torch.bfloat16) is None]


def head(device: Device, rows: int) -> list[dict[str, Any]]:
    hidden = torch.randn(rows, HIDDEN, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(VOCAB, HIDDEN, device="cuda") * 0.02).bfloat16().requires_grad_()
    labels = torch.randint(VOCAB, (rows,), device="cuda")

    def ours(body: str, chunk: int | None) -> Callable[[], None]:
        def run() -> None:
            ops.configure({"linear_cross_entropy": body}, "cuda", torch.bfloat16)
            loss = ops.linear_cross_entropy(hidden, weight, labels, chunk=chunk)
            (loss / rows).backward()
            hidden.grad = weight.grad = None

        return run

    runs = {
        f"{body}, chunks of {chunk or 'the default'}": ours(body, chunk)
        for body in fused_bodies("linear_cross_entropy")
        for chunk in (None, 2048)
    }
    products = (("NT", rows, VOCAB, HIDDEN), ("NN", rows, HIDDEN, VOCAB), ("TN", VOCAB, HIDDEN, rows))
    pairs: list[tuple[Tensor, Tensor]] = []
    work = Work(flops=6 * rows * HIDDEN * VOCAB, products=products, operands=lambda *inputs: pairs)
    lines, memory = [], {}
    for name, run in runs.items():
        run()  # compiles, and makes the products' workspace
        memory[name] = peak_bytes(run) - 4 * VOCAB * HIDDEN
    pairs += head_operands(hidden, weight, labels)
    for name, run in runs.items():
        timed, bare = device.beside_products(run, work, torch.bfloat16, ())
        ms = timed.ms
        lines.append(
            {
                "name": name,
                "ms": round(ms, 2),
                "products_ms": round(bare, 2),
                "products_tflops": round(work.flops / bare / 1e9, 1),
                "times_products": round(ms / bare, 3),
                "extra_gib": round(memory[name] / GIB, 3),
            }
        )
    return lines


def rows_alone(device: Device, rows: int) -> list[dict[str, Any]]:
    logits = torch.randn(rows, VOCAB, device="cuda").bfloat16()
    other, labels = torch.empty_like(logits), torch.randint(VOCAB, (rows,), device="cuda")
    leaf = logits.view_as(logits).requires_grad_()
    ops.configure({}, "cuda", torch.bfloat16)

    def whole() -> None:
        torch.autograd.grad(ops.cross_entropy(leaf.view_as(leaf), labels), leaf)

    # The gradients of gradients that the repeats make are small numbers, not what is timed: kernels read all of them.
    runs: dict[str, Callable[[], Any]] = {
        f"cross_entropy_rows, {body}": lambda run=rows_module.ROWS_OP.bodies[body].run[0]: run(
            logits, labels, 0.0, True
        )
        for body in fused_bodies("linear_cross_entropy")
    }
    runs["cross_entropy, forward and backward"] = whole
    runs["copy"] = lambda: other.copy_(logits)
    times = dict(zip(runs, device.steady(list(runs.values())), strict=True))
    moved = 2 * logits.numel() * logits.element_size()
    copy = times["copy"]
    return [
        {
            "name": name,
            "ms": round(ms, 3),
            "tb_per_s": round(moved / ms / 1e9, 3),
            "share_of_copy": round(copy / ms, 3),
        }
        for name, ms in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--out", help="write the numbers there as JSON, too")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = Device.here("cuda")
    lines = head(device, options.rows)
    torch.cuda.empty_cache()
    lines += rows_alone(device, options.rows)
    for line in lines:
        print(f"{line['name']:<44}" + "  ".join(f"{k} {v}" for k, v in line.items() if k != "name"))
    if options.out:
        facts = {
            "benchmark": "linear_loss",
            "device": device_name(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "sizes": {"rows": options.rows, "hidden": HIDDEN, "vocab": VOCAB},
        }
        with open(options.out, "w") as file:
            file.write(json.dumps(facts | {"rows": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
