"""Quantising to fp8 and linear layers in fp8, on one GPU, at the sizes of a Llama-3-8B layer, bf16, 16k tokens.

    python -m benchmarks.fp8 [--tokens 16384] [--repeats 20] [--quick] [--out FILE]

Quantising: milliseconds, and the bytes that must move (the input once, each code and scale once) a second, as a share
of what a copy reaches in the same run; where a kernel has to read its input twice (rowwise scales of the transposed
copy need the whole column first; a norm its row), "moved" counts that too. Rivals: the same in plain PyTorch, and
that through torch.compile. Linear layers: forward and backward (both gradients) of fp8_linear, and of what takes the
norm or the gated unit along, against F.linear in bf16, with the weight quantised each time.

Random data; inputs rotate, so that none is in the cache from the call before; CUDA events around each call, medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import RESULTS, device_name
from megatune import ops
from megatune.ops import Fp8Recipe
from megatune.ops.fp8_quantise import BOTH, ROWS, Quantised, quantise, quantise_glu, quantise_rms_norm

LAYERS = (("qkv", 4096, 6144), ("o", 4096, 4096), ("gate_up", 4096, 28672), ("down", 14336, 4096))
RECIPES = {
    "rowwise": Fp8Recipe("rowwise"),
    "rowwise, gradients added in fp32": Fp8Recipe("rowwise", fast_gradients=False),
    "rowwise, e5m2 gradients": Fp8Recipe("rowwise", "e5m2"),
    "rowwise, bf16 wgrad": Fp8Recipe("rowwise", wgrad="bf16"),
    "blockwise": Fp8Recipe("blockwise"),
}


def median_ms(calls: Sequence[Callable[[], Any]], repeats: int) -> float:
    """Of `repeats` calls, one after the other in turn, each between two events; nothing waits for the host."""
    for call in calls[:2]:
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    # Work for the device while the host gets ahead of it.
    torch.cuda._sleep(20_000_000)
    for number, (began, ended) in enumerate(events):
        began.record()
        calls[number % len(calls)]()
        ended.record()
    torch.cuda.synchronize()
    return statistics.median(began.elapsed_time(ended) for began, ended in events)


def copy_rate(repeats: int) -> float:
    """Bytes read and written a second by a copy of 512 MiB."""
    sources = [torch.randint(256, (2**29,), dtype=torch.uint8, device="cuda") for _ in range(2)]
    target = torch.empty_like(sources[0])
    ms = median_ms([partial(target.copy_, x) for x in sources], repeats)
    return 2 * 2**29 / ms * 1e3


def size_of(made: Quantised) -> int:
    return sum(x.numel() * x.element_size() for x in (made.codes, made.scales, made.codes_t, made.scales_t))


def quantising(tokens: int, width: int, scaling: str) -> list[tuple[str, str, list[Tensor], Any, int]]:
    """(op, name, inputs in turn, function of one, times that the input is read)"""
    weight = torch.randn(width, device="cuda").bfloat16()
    inputs = [torch.randn(tokens, width, device="cuda").bfloat16() for _ in range(3)]
    gate_ups = [torch.randn(tokens, 2 * width, device="cuda").bfloat16() for _ in range(2)]
    twice = 2 if scaling == "rowwise" else 1
    return [
        ("fp8_quantise", "activation or gradient", inputs, lambda x: quantise(x, scaling), twice),
        ("fp8_quantise", "one copy", inputs, lambda x: quantise(x, scaling, copies=ROWS), 1),
        (
            "fp8_rms_norm",
            "norm",
            inputs,
            lambda x: quantise_rms_norm(x, weight, 1e-5, 0.0, scaling, copies=BOTH)[0],
            2,
        ),
        ("fp8_glu", "gated unit", gate_ups, lambda x: quantise_glu(x, "silu", scaling), twice),
    ]


def quantise_rows(tokens: int, copy: float, repeats: int, rivals: bool) -> list[dict[str, Any]]:
    rows = []
    for width in (4096, 14336):
        cases = [(s, *case) for s in ("blocks", "rowwise") for case in quantising(tokens, width, s)]
        weights = [torch.randn(width, 4096, device="cuda").bfloat16() for _ in range(3)]
        cases.append(("tiles", "fp8_quantise", "weight", weights, lambda x: quantise(x, "tiles"), 1))
        for scaling, op, name, inputs, function, reads in cases:
            # Rivals once for each op and kind of scale: torch.compile takes seconds for each.
            shown = (
                name == "activation or gradient"
                or scaling == "tiles"
                or (op != "fp8_quantise" and scaling == "blocks")
            )
            bodies = ("cuda", "compiled", "reference") if rivals and shown and width == 4096 else ("cuda",)
            for body in bodies:
                ops.configure({op: body}, "cuda")
                written = size_of(function(inputs[0]))
                read = inputs[0].numel() * inputs[0].element_size()
                ms = median_ms([partial(function, x) for x in inputs], repeats)
                rate = (read + written) / ms * 1e3
                rows.append(
                    {
                        "op": op,
                        "what": name,
                        "scaling": scaling,
                        "size": list(inputs[0].shape),
                        "body": body,
                        "ms": round(ms, 4),
                        "gb_per_second": round(rate / 1e9),
                        "of_copy": round(rate / copy, 3),
                        "moved_of_copy": round((reads * read + written) / ms * 1e3 / copy, 3),
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
            ops.configure({}, "cuda")
    return rows


def both_passes(call: Callable[..., Tensor], leaves: tuple[Tensor, ...], grad: Tensor) -> Callable[[], Any]:
    def run() -> None:
        torch.autograd.grad(call(*leaves), leaves, grad)

    return run


def linear_rows(tokens: int, repeats: int, recipes: dict[str, Fp8Recipe]) -> list[dict[str, Any]]:
    rows = []
    totals: dict[str, float] = {}
    for name, inner, outer in LAYERS:
        xs = [torch.randn(tokens, inner, device="cuda").bfloat16().requires_grad_() for _ in range(2)]
        weight = (torch.randn(outer, inner, device="cuda") / inner**0.5).bfloat16().requires_grad_()
        grad = torch.randn(tokens, outer, device="cuda").bfloat16()
        calls: dict[str, Callable[..., Tensor]] = {"bf16": F.linear}
        for label, recipe in recipes.items():
            calls[label] = lambda x, w, recipe=recipe: ops.fp8_linear(x, w, recipe=recipe)
        for label, call in calls.items():
            ms = median_ms([both_passes(call, (x, weight), grad) for x in xs], repeats)
            totals[label] = totals.get(label, 0.0) + ms
            flops = 6 * tokens * inner * outer
            rows.append({"layer": name, "in": inner, "out": outer, "how": label, "ms": round(ms, 3)})
            rows[-1] |= {"tflops": round(flops / ms / 1e9), "speedup": round(rows_bf16(rows, name) / ms, 3)}
            print(json.dumps(rows[-1]), flush=True)
    for label, ms in totals.items():
        rows.append(
            {"layer": "all", "how": label, "ms": round(ms, 3), "speedup": round(totals["bf16"] / ms, 3)}
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def rows_bf16(rows: list[dict[str, Any]], layer: str) -> float:
    return next(row["ms"] for row in rows if row["layer"] == layer and row["how"] == "bf16")


def fused_rows(tokens: int, repeats: int) -> list[dict[str, Any]]:
    """A layer with what stands before it: norm and gate_up, gated unit and down."""
    rows = []
    x = torch.randn(tokens, 4096, device="cuda").bfloat16().requires_grad_()
    scale = torch.randn(4096, device="cuda").bfloat16().requires_grad_()
    up = (torch.randn(28672, 4096, device="cuda") / 64).bfloat16().requires_grad_()
    gate_up = torch.randn(tokens, 28672, device="cuda").bfloat16().requires_grad_()
    down = (torch.randn(4096, 14336, device="cuda") / 120).bfloat16().requires_grad_()
    grads = [torch.randn(tokens, width, device="cuda").bfloat16() for width in (28672, 4096)]
    for label, recipe in (("bf16", None), ("rowwise", Fp8Recipe()), ("blockwise", Fp8Recipe("blockwise"))):
        if recipe is None:
            norm = lambda x, s, w: F.linear(ops.rms_norm(x, s, 1e-5), w)  # noqa: E731
            glu = lambda g, w: F.linear(ops.glu(g, "silu"), w)  # noqa: E731
        elif label in ops.fp8_products():
            norm = lambda x, s, w, r=recipe: ops.fp8_norm_linear(x, s, 1e-5, w, recipe=r)  # noqa: E731
            glu = lambda g, w, r=recipe: ops.fp8_glu_linear(g, "silu", w, recipe=r)  # noqa: E731
        else:
            continue
        for name, call, leaves, grad in (
            ("norm + gate_up", norm, (x, scale, up), grads[0]),
            ("glu + down", glu, (gate_up, down), grads[1]),
        ):
            ms = median_ms([both_passes(call, leaves, grad)], repeats)
            rows.append({"layer": name, "how": label, "ms": round(ms, 3)})
            rows[-1]["speedup"] = round(rows_bf16(rows, name) / ms, 3)
            print(json.dumps(rows[-1]), flush=True)
    return rows


def facts() -> dict[str, Any]:
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.split("\n")[0]
    return {
        "benchmark": "fp8",
        "device": device_name(),
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "products": ops.fp8_products(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--quick", action="store_true", help="without the rivals that torch.compile has to make"
    )
    parser.add_argument("--out")
    options = parser.parse_args()
    copy = copy_rate(options.repeats)
    print(f"copy: {copy / 1e12:.3f} TB/s")
    recipes = {name: recipe for name, recipe in RECIPES.items() if recipe.scaling in ops.fp8_products()}
    content = facts() | {"tokens": options.tokens, "copy_gb_per_second": round(copy / 1e9)}
    content["quantise"] = quantise_rows(options.tokens, copy, options.repeats, not options.quick)
    content["linear"] = linear_rows(options.tokens, options.repeats, recipes)
    content["fused"] = fused_rows(options.tokens, options.repeats)
    with open(options.out or RESULTS / "fp8.json", "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
