"""Every op on one GPU: its bodies against each other and against plain PyTorch, at Llama-3.2-1B's sizes, bf16.

    python -m benchmarks.ops_gpu [--repeats 20] [--out FILE]

Milliseconds between two events around the call, median of `repeats`, forward and backward; and the memory that
forward leaves behind for backward.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import RESULTS, device_name
from benchmarks.ops_cases import LLAMA_1B, Case, cases
from megatune import ops


def median_ms(function: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats + 3):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        function()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return statistics.median(times[3:])


def measure(
    function: Callable[..., torch.Tensor], leaves: tuple[torch.Tensor, ...], repeats: int
) -> dict[str, float]:
    function(*leaves)  # compiles
    before = torch.cuda.memory_allocated()
    output = function(*leaves)
    kept = torch.cuda.memory_allocated() - before
    grad = torch.randn_like(output)
    forward = median_ms(lambda: function(*leaves), repeats)
    backward = median_ms(lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True), repeats)
    return {
        "forward_ms": round(forward, 3),
        "backward_ms": round(backward, 3),
        "kept_mib": round(kept / 2**20, 1),
    }


def rows_of(case: Case, repeats: int) -> list[dict[str, Any]]:
    rows = [{"op": case.op, "body": "plain PyTorch"} | measure(case.plain, case.leaves, repeats)]
    bodies = ops.OPS[case.op].bodies.values() if case.op in ops.OPS else []
    for body in [body for body in bodies if body.unfit("cuda", torch.bfloat16) is None]:
        ops.configure({case.op: body.name}, "cuda", torch.bfloat16)
        rows.append({"op": case.op, "body": body.name} | measure(case.run, case.leaves, repeats))
    ops.configure({}, "cuda")
    if not bodies:
        rows.append({"op": case.op, "body": "megatune"} | measure(case.run, case.leaves, repeats))
    chosen = ops.chosen("cuda", torch.bfloat16).get(case.op, "megatune")
    return [row | {"chosen": row["body"] == chosen} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out")
    options = parser.parse_args()
    rows = []
    for case in cases(LLAMA_1B, torch.bfloat16, "cuda"):
        for row in rows_of(case, options.repeats):
            rows.append(row)
            mark = "<- chosen" if row["chosen"] else ""
            print(
                f"{row['op']:<22}{row['body']:<14} forward {row['forward_ms']:>8.3f} ms  "
                f"backward {row['backward_ms']:>8.3f} ms  kept {row['kept_mib']:>7.1f} MiB  {mark}"
            )
    facts = {"benchmark": "ops_gpu", "device": device_name(), "torch": torch.__version__}
    content = facts | {"sizes": vars(LLAMA_1B), "rows": rows}
    with open(options.out or RESULTS / "ops_gpu.json", "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
