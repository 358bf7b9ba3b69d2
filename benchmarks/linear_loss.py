"""The head and its loss on one GPU, at Llama-3-8B's sizes in bf16: time beside the bare products, memory, bandwidth.

    python -m benchmarks.linear_loss [--rows 16384] [--repeats 5] [--out FILE]

`linear_cross_entropy`, forward and backward with both gradients, for each of its fused bodies and some chunks, as a
multiple of its three matrix products by themselves in the same run (whole, with bf16 results); and its peak memory
beyond the inputs and the weight's fp32 gradient. Then the loss on given logits by itself (`cross_entropy_rows`): bytes
that must move, each logit read once and its gradient written once, as a share of what a copy of the same logits
reaches. Milliseconds between two events, medians; bodies and rivals take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import device_name
from megatune import ops
from megatune.ops import cross_entropy_rows as rows_module

HIDDEN, VOCAB = 4096, 128256
GIB = 2**30


def interleaved_ms(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, one after the other `repeats` times, after one call for warming up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            function()
            ended.record()
            ended.synchronize()
            if turn:
                times[name].append(began.elapsed_time(ended))
    return {name: statistics.median(found) for name, found in times.items()}


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
        for chunk in (None, 2048, 2093)
    }
    memory = {}
    for name, run in runs.items():
        run()  # compiles, and makes the products' workspace
        memory[name] = peak_bytes(run) - 4 * VOCAB * HIDDEN
    logits = torch.empty(rows, VOCAB, device="cuda", dtype=torch.bfloat16)
    results = torch.empty_like(hidden, requires_grad=False), torch.empty_like(weight, requires_grad=False)

    @torch.no_grad()
    def products() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=results[0])
        torch.mm(logits.t(), hidden, out=results[1])

    times = interleaved_ms(runs | {"three products": products}, repeats)
    bare = times.pop("three products")
    flops = 6 * rows * HIDDEN * VOCAB
    lines = [{"name": "three products", "ms": round(bare, 2), "tflops": round(flops / bare / 1e9, 1)}]
    for name, ms in times.items():
        extra = round(memory[name] / GIB, 3)
        lines.append(
            {"name": name, "ms": round(ms, 2), "times_products": round(ms / bare, 3), "extra_gib": extra}
        )
    return lines


def rows_alone(rows: int, repeats: int) -> list[dict[str, Any]]:
    logits = torch.randn(rows, VOCAB, device="cuda").bfloat16()
    other, labels = torch.empty_like(logits), torch.randint(VOCAB, (rows,), device="cuda")
    # The gradients of gradients that the repeats make are small numbers, not what is timed: kernels read all of them.
    runs: dict[str, Callable[[], Tensor]] = {
        body: lambda run=rows_module.ROWS_OP.bodies[body].run[0]: run(logits, labels, 0.0, True)
        for body in fused_bodies("linear_cross_entropy")
    }
    times = interleaved_ms(runs | {"copy": lambda: other.copy_(logits)}, repeats)
    moved = 2 * logits.numel() * logits.element_size()
    copy = times["copy"]
    return [
        {
            "name": f"cross_entropy_rows, {name}" if name != "copy" else "copy of the logits",
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
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="write the numbers there as JSON, too")
    options = parser.parse_args()
    torch.manual_seed(0)
    lines = head(options.rows, options.repeats)
    torch.cuda.empty_cache()
    lines += rows_alone(4096, 4 * options.repeats)
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
