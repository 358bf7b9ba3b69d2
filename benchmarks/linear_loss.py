"""The head and its loss on one GPU, at Llama-3-8B's sizes in bf16: time beside the bare products, memory, bandwidth.

    python -m benchmarks.linear_loss [--rows 16384] [--repeats 9] [--out FILE]

`linear_cross_entropy`, forward and backward with both gradients, for each of its fused bodies and some chunks, as a
multiple of its three matrix products by themselves (whole, with bf16 results), which are timed in turn with it: under
this load clocks fall, and fall further for some numbers than for others (random ones take 5 to 10 % longer than
gradients), so the products have the op's own numbers. And its peak memory beyond the inputs and the weight's fp32
gradient. Then the loss of given logits (`cross_entropy_rows`, and `cross_entropy` with its backward): bytes that must
move, each logit read once and its gradient written once, as a share of what a copy of the same logits reaches.
Milliseconds between two events, medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import device_name
from megatune import ops
from megatune.ops import cross_entropy_rows as rows_module

HIDDEN, VOCAB = 4096, 128256
GIB = 2**30


def interleaved_ms(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, one after the other `repeats` times without a pause, after one call each."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range((repeats + 1) * len(functions) + 1)]
    marks[0].record()
    for number, mark in enumerate(marks[1:]):
        list(functions.values())[number % len(functions)]()
        mark.record()
    torch.cuda.synchronize()
    times = [began.elapsed_time(ended) for began, ended in pairwise(marks)][len(functions) :]
    return {name: statistics.median(times[place :: len(functions)]) for place, name in enumerate(functions)}


def bare_products(hidden: Tensor, weight: Tensor, labels: Tensor) -> Callable[[], None]:
    """The products of the op, whole and bare: the last two are of the logits' gradient."""
    hidden, weight = hidden.detach(), weight.detach()
    logits = torch.empty(hidden.shape[0], weight.shape[0], device=hidden.device, dtype=hidden.dtype)
    grad = torch.mm(hidden, weight.t())
    ops.cross_entropy(grad.requires_grad_().view_as(grad), labels)
    results = torch.empty_like(hidden), torch.empty_like(weight)

    @torch.no_grad()
    def run() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(grad, weight, out=results[0])
        torch.mm(grad.t(), hidden, out=results[1])

    return run


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


def head(rows: int, repeats: int) -> list[dict[str, Any]]:
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
    flops = 6 * rows * HIDDEN * VOCAB
    lines, memory = [], {}
    for name, run in runs.items():
        run()  # compiles, and makes the products' workspace
        memory[name] = peak_bytes(run) - 4 * VOCAB * HIDDEN
    products = bare_products(hidden, weight, labels)
    for name, run in runs.items():
        times = interleaved_ms({name: run, "three products": products}, repeats)
        ms, bare = times[name], times["three products"]
        lines.append(
            {
                "name": name,
                "ms": round(ms, 2),
                "products_ms": round(bare, 2),
                "products_tflops": round(flops / bare / 1e9, 1),
                "times_products": round(ms / bare, 3),
                "extra_gib": round(memory[name] / GIB, 3),
            }
        )
    return lines


def rows_alone(rows: int, repeats: int) -> list[dict[str, Any]]:
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
    times = interleaved_ms(runs | {"copy": lambda: other.copy_(logits)}, repeats)
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
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", help="write the numbers there as JSON, too")
    options = parser.parse_args()
    torch.manual_seed(0)
    lines = head(options.rows, options.repeats)
    torch.cuda.empty_cache()
    lines += rows_alone(options.rows, options.repeats)
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
