"""Linear layers in fp8 on one GPU, at the sizes of a Llama-3-8B layer, bf16, 16k tokens, for each recipe.

    python -m benchmarks.fp8 [--tokens 16384] [--out FILE]

Forward and backward (both gradients) of fp8_linear, and of what takes the norm or the gated unit along, against
F.linear in bf16, with the weight quantised each time: milliseconds, medians of what the GPU keeps up. The quantising by
itself, against its limit, is in `python -m benchmarks.ops`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import RESULTS, device_name
from benchmarks.ops_timing import Device
from megatune import ops
from megatune.launch.show_environment import nvidia_versions
from megatune.ops import Fp8Recipe

LAYERS = (("qkv", 4096, 6144), ("o", 4096, 4096), ("gate_up", 4096, 28672), ("down", 14336, 4096))
RECIPES = {
    "rowwise": Fp8Recipe("rowwise"),
    "rowwise, gradients added in fp32": Fp8Recipe("rowwise", fast_gradients=False),
    "rowwise, e5m2 gradients": Fp8Recipe("rowwise", "e5m2"),
    "rowwise, bf16 wgrad": Fp8Recipe("rowwise", wgrad="bf16"),
    "blockwise": Fp8Recipe("blockwise"),
}


def both_passes(call: Callable[..., Tensor], leaves: tuple[Tensor, ...], grad: Tensor) -> Callable[[], Any]:
    def run() -> None:
        torch.autograd.grad(call(*leaves), leaves, grad)

    return run


def linear_rows(device: Device, tokens: int, recipes: dict[str, Fp8Recipe]) -> list[dict[str, Any]]:
    rows = []
    totals: dict[str, float] = {}
    for name, inner, outer in LAYERS:
        x = torch.randn(tokens, inner, device="cuda").bfloat16().requires_grad_()
        weight = (torch.randn(outer, inner, device="cuda") / inner**0.5).bfloat16().requires_grad_()
        grad = torch.randn(tokens, outer, device="cuda").bfloat16()
        calls = {"bf16": both_passes(F.linear, (x, weight), grad)}
        for label, recipe in recipes.items():
            layer = partial(ops.fp8_linear, recipe=recipe)
            calls[label] = both_passes(layer, (x, weight), grad)
        times = {label: device.steady([call])[0] for label, call in calls.items()}
        for label, ms in times.items():
            totals[label] = totals.get(label, 0.0) + ms
            flops = 6 * tokens * inner * outer
            row = {"layer": name, "in": inner, "out": outer, "how": label, "ms": round(ms, 3)}
            rows.append(row | {"tflops": round(flops / ms / 1e9), "speedup": round(times["bf16"] / ms, 3)})
            print(json.dumps(rows[-1]), flush=True)
    for label, ms in totals.items():
        rows.append(
            {"layer": "all", "how": label, "ms": round(ms, 3), "speedup": round(totals["bf16"] / ms, 3)}
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def fused_rows(device: Device, tokens: int) -> list[dict[str, Any]]:
    """A layer with what stands before it: norm and gate_up, gated unit and down."""
    rows = []
    x = torch.randn(tokens, 4096, device="cuda").bfloat16().requires_grad_()
    scale = torch.randn(4096, device="cuda").bfloat16().requires_grad_()
    up = (torch.randn(28672, 4096, device="cuda") / 64).bfloat16().requires_grad_()
    gate_up = torch.randn(tokens, 28672, device="cuda").bfloat16().requires_grad_()
    down = (torch.randn(4096, 14336, device="cuda") / 120).bfloat16().requires_grad_()
    grads = [torch.randn(tokens, width, device="cuda").bfloat16() for width in (28672, 4096)]
    norm = {"bf16": lambda x, s, w: F.linear(ops.rms_norm(x, s, 1e-5), w)}
    glu = {"bf16": lambda g, w: F.linear(ops.glu(g, "silu"), w)}
    for label in ops.fp8_products():
        recipe = Fp8Recipe(label)
        norm[label] = lambda x, s, w, r=recipe: ops.fp8_norm_linear(x, s, 1e-5, w, recipe=r)
        glu[label] = lambda g, w, r=recipe: ops.fp8_glu_linear(g, "silu", w, recipe=r)
    for name, layers, leaves, grad in (
        ("norm + gate_up", norm, (x, scale, up), grads[0]),
        ("glu + down", glu, (gate_up, down), grads[1]),
    ):
        calls = {label: both_passes(call, leaves, grad) for label, call in layers.items()}
        times = {label: device.steady([call])[0] for label, call in calls.items()}
        for label, ms in times.items():
            speedup = round(times["bf16"] / ms, 3)
            rows.append({"layer": name, "how": label, "ms": round(ms, 3), "speedup": speedup})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--out")
    options = parser.parse_args()
    device = Device.here("cuda")
    recipes = {name: recipe for name, recipe in RECIPES.items() if recipe.scaling in ops.fp8_products()}
    content = {
        "benchmark": "fp8",
        "device": device_name(),
        "torch": torch.__version__,
        "versions": dict(nvidia_versions()),
        "products": ops.fp8_products(),
        "tokens": options.tokens,
        "linear": linear_rows(device, options.tokens, recipes),
        "fused": fused_rows(device, options.tokens),
    }
    with open(options.out or RESULTS / "fp8.json", "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
