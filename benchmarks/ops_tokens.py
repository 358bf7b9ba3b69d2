"""Ops that turn, look up or move rows of tokens, on one GPU: their bodies against each other, and what was used before.

    python -m benchmarks.ops_tokens [--repeats 5] [--bodies torch,cuda,compiled] [--out FILE]

16k tokens, bf16, sizes of Llama-3-8B and Qwen3-30B-A3B. Milliseconds of a call in a row of ten, median of `repeats`
rows, forward and backward; bytes that must be read and written at least over that time, as a share of the bandwidth of
a copy measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import RESULTS, device_name
from megatune import ops
from megatune.ops import moe

TOKENS, IN_A_ROW = 16384, 10


@dataclass(frozen=True)
class Case:
    """`run` and `plain` take `leaves` (all with a gradient) and give tensors; bytes: least traffic of a direction."""

    name: str
    op: str
    leaves: tuple[Tensor, ...]
    run: Callable[..., Sequence[Tensor]]
    plain: Callable[..., Sequence[Tensor]]
    forward_bytes: int
    backward_bytes: int


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()


def heads(name: str, groups: int, queries: int, width: int, norm: bool) -> Case:
    qkv = leaf(TOKENS, groups, queries + 2, width)
    weights = (leaf(width), leaf(width)) if norm else ()
    angle = torch.arange(TOKENS, device="cuda")[:, None] / 10000 ** (
        torch.arange(width // 2, device="cuda") / 64
    )
    cos, sin = angle.cos(), angle.sin()

    def plain(qkv: Tensor, *weights: Tensor) -> Sequence[Tensor]:
        q, k, v = qkv.split((queries, 1, 1), 2)
        if weights:
            q, k = (ops.rms_norm(x, w, 1e-6) for x, w in zip((q, k), weights, strict=True))
        return ops.rope(q, cos, sin), ops.rope(k, cos, sin), v

    head = 2 * TOKENS * groups * width
    turned, angles = head * (queries + 1), 4 * TOKENS * width
    return Case(
        name,
        "rope_qk",
        (qkv, *weights),
        lambda qkv, *weights: ops.rope_qk(qkv, cos, sin, *weights, eps=1e-6),
        plain,
        2 * turned + angles,
        turned * (3 if norm else 2) + 2 * head + angles,
    )


def lookup() -> Case:
    rows, width = 128256, 4096
    index = (torch.rand(TOKENS, device="cuda") ** 4 * rows).long()
    return Case(
        "embedding",
        "embedding",
        (leaf(rows, width),),
        lambda table: (ops.embedding(index, table),),
        lambda table: (F.embedding(index, table),),
        4 * TOKENS * width,
        2 * TOKENS * width + 2 * rows * width,
    )


def routing() -> Case:
    experts, top_k = 128, 8

    def plain(logits: Tensor) -> Sequence[Tensor]:
        probabilities = logits.softmax(1)
        weights, _ = probabilities.topk(top_k, 1)
        return weights / weights.sum(1, keepdim=True), probabilities

    logits = leaf(TOKENS, experts, dtype=torch.float32)
    size = 4 * TOKENS * experts
    return Case("router", "router", (logits,), lambda x: ops.route(x, top_k)[1:], plain, 2 * size, 3 * size)


def rows_of_experts(back: bool) -> Case:
    width, top_k = 2048, 8
    order = moe.sort_by_expert(torch.rand(TOKENS, 128, device="cuda").topk(top_k, 1).indices, 128)
    one, many = 2 * TOKENS * width, 2 * TOKENS * top_k * width
    if back:
        weights = torch.rand(TOKENS, top_k, device="cuda").requires_grad_()
        leaves = leaf(TOKENS * top_k, width), weights
        return Case(
            "combine",
            "expert_rows",
            leaves,
            lambda rows, weights: (moe.combine(rows, weights, order),),
            lambda rows, weights: ((rows[order.place] * weights[:, :, None]).sum(1).bfloat16(),),
            many + one,
            2 * many + one,
        )
    tokens = order.tokens
    return Case(
        "permute",
        "expert_rows",
        (leaf(TOKENS, width),),
        lambda x: (moe.permute(x, order),),
        lambda x: (x[tokens],),
        many + one,
        many + one,
    )


def median_ms(function: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        for _ in range(IN_A_ROW):
            function()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / IN_A_ROW)
    return statistics.median(times[1:])


def copy_bandwidth(repeats: int) -> float:
    """Bytes read and written in a millisecond by a copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source), repeats)


def measure(
    case: Case, function: Callable[..., Sequence[Tensor]], repeats: int, copy: float
) -> dict[str, Any]:
    outputs = function(*case.leaves)  # compiles
    grads = [torch.randn_like(y) for y in outputs]
    forward = median_ms(lambda: function(*case.leaves), repeats)
    backward = median_ms(lambda: torch.autograd.grad(outputs, case.leaves, grads, retain_graph=True), repeats)
    return {
        "forward_ms": round(forward, 4),
        "backward_ms": round(backward, 4),
        "forward_share": round(case.forward_bytes / forward / copy, 3),
        "backward_share": round(case.backward_bytes / backward / copy, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bodies", default="torch,cuda,compiled")
    parser.add_argument("--out")
    options = parser.parse_args()
    copy = copy_bandwidth(options.repeats)
    rows = []
    makers = (
        lambda: heads("rope_qk, Llama-3-8B", 8, 4, 128, False),
        lambda: heads("rope_qk with norm, Qwen3-30B-A3B", 4, 8, 128, True),
        routing,
        lambda: rows_of_experts(False),
        lambda: rows_of_experts(True),
        lookup,
    )
    for make in makers:
        case = make()
        functions = [("before", case.plain)]
        functions += [(name, case.run) for name in options.bodies.split(",") if name in ops.BODIES[case.op]]
        for name, function in functions:
            if name != "before":
                ops.configure({case.op: name}, "cuda")
            rows.append({"case": case.name, "body": name} | measure(case, function, options.repeats, copy))
            ops.configure({}, "cuda")
            print(" ".join(f"{value!s:<14}" for value in rows[-1].values()), flush=True)
    facts = {"benchmark": "ops_tokens", "device": device_name(), "torch": torch.__version__, "tokens": TOKENS}
    content = facts | {"copy_gb_s": round(copy / 1e6, 1), "rows": rows}
    with open(options.out or RESULTS / "ops_tokens.json", "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
