"""Every op on one CPU thread: its bodies against each other and against plain PyTorch, at SmolLM2-135M's sizes.

    python -m benchmarks.ops_cpu [--repeats 15] [--out FILE]

Milliseconds of the thread's own processor time (so that other programs on the machine count little), the best of
`repeats`, for the forward pass and for the backward pass. The automatic choice is the body at the top of its list in
megatune/ops: the benchmark says so where another one was faster.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks import ops_cases_fp8, ops_cases_loss, ops_cases_moe, ops_cases_optim  # noqa: F401 - register their cases
from benchmarks.common import RESULTS, device_name
from benchmarks.ops_cases import SMOLLM2_135M, Case, Other, Tensors, makers
from benchmarks.ops_timing import tensors_in
from megatune import ops

TIMED = ("rms_norm", "rope", "swiglu", "attention", "linear_cross_entropy", "lora_linear")


def best_ms(function: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        began = time.thread_time()
        function()
        times.append(time.thread_time() - began)
    return min(times[2:]) * 1e3


def measure(other: Other, inputs: Tensors, repeats: int) -> dict[str, float]:
    leaves = [x.detach().requires_grad_() for x in other.prepare(inputs)]
    outputs = tensors_in(other.run(*leaves))
    grads = [torch.randn_like(output) for output in outputs]
    forward = best_ms(lambda: other.run(*leaves), repeats)
    backward = best_ms(lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True), repeats)
    return {"forward_ms": round(forward, 3), "backward_ms": round(backward, 3)}


def rows_of(case: Case, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    what = {"op": case.op, "dtype": str(dtype).removeprefix("torch.")}
    torch.manual_seed(0)
    inputs, ours, registry = case.make(), Other(case.run), case.registry or case.op
    rows = [what | {"body": "plain PyTorch"} | measure(case.plain, inputs, repeats)]
    bodies = ops.OPS[registry].bodies.values() if registry in ops.OPS else []
    for body in [body for body in bodies if body.unfit("cpu", dtype) is None]:
        ops.configure({registry: body.name}, "cpu", dtype)
        rows.append(what | {"body": body.name} | measure(ours, inputs, repeats))
    ops.configure({}, "cpu")
    if not bodies:
        rows.append(what | {"body": "megatune"} | measure(ours, inputs, repeats))
    chosen = ops.chosen("cpu", dtype).get(registry, "megatune")
    for row in rows:
        row["chosen"] = row["body"] == chosen
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for op, make in makers("llama-8b", SMOLLM2_135M, dtype, "cpu"):
            if op not in TIMED:
                continue
            found = rows_of(make(), dtype, options.repeats)
            rows += found
            for row in found:
                mark = "<- chosen" if row["chosen"] else ""
                print(
                    f"{row['op']:<22}{row['dtype']:<10}{row['body']:<14} forward {row['forward_ms']:>9.3f} ms  "
                    f"backward {row['backward_ms']:>9.3f} ms  {mark}"
                )
            ours = [row for row in found if row["body"] != "plain PyTorch"]
            fastest = min(ours, key=lambda row: row["forward_ms"] + row["backward_ms"])
            if not fastest["chosen"]:
                print(f"  note: {fastest['body']} is faster here than the automatic choice")
    facts = {"benchmark": "ops_cpu", "device": device_name(), "torch": torch.__version__}
    content = facts | {"sizes": vars(SMOLLM2_135M), "rows": rows}
    path = options.out or RESULTS / "ops_cpu.json"
    with open(path, "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
